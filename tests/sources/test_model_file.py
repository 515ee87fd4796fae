"""A network in a Python file: found, run in isolation, copied whole."""

import importlib
import sys

import pytest
import torch

from dbconvert.errors import DBConvertError, UsageError
from dbconvert.sources.resolve import open_source, reopen_source

LAYERS = """
from torch import nn
class Block(nn.Module):
    def __init__(self, width={width}):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)
    def forward(self, x):
        return x + self.linear(self.norm(x))
"""
MODEL = """
from torch import nn
from parts.layers import Block
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, {width}), *[Block() for _ in range(4)])
def build_model():
    import helpers  # inside a function: still part of the source
    return Net()
small = nn.Linear(8, 8)
def needs(width):
    return nn.Linear(width, width)
"""


def project(folder, width=16):
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "__init__.py").touch()
    (folder / "parts" / "layers.py").write_text(LAYERS.format(width=width))
    (folder / "model.py").write_text(MODEL.format(width=width))
    (folder / "helpers.py").touch()
    (folder / "unrelated.py").write_text("raise RuntimeError('never imported')")
    return folder / "model.py"


def test_neighbours_that_were_imported_before_belong_to_it(tmp_path, monkeypatch):
    """As in a notebook that has tried the network already."""
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "__init__.py").touch()
    (tmp_path / "before" / "shapes.py").write_text("WIDTH = 16")
    (tmp_path / "before" / "layers.py").write_text("from .shapes import WIDTH" + LAYERS.format(width="WIDTH"))
    (tmp_path / "tried.py").write_text(
        MODEL.format(width=16).replace("parts.", "before.").replace("import helpers", "")
    )
    (tmp_path / "unrelated_before.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["tried", "unrelated_before", "before", "before.layers", "before.shapes"]
    for name in names[:2]:
        importlib.import_module(name)
    try:
        files = open_source(str(tmp_path / "tried.py")).ref.files
    finally:
        for name in names:
            sys.modules.pop(name)
    assert files == ("tried.py", "before/__init__.py", "before/layers.py", "before/shapes.py")


def test_entry_points(tmp_path):
    path = project(tmp_path)
    assert type(open_source(str(path)).build()).__name__ == "Net"
    assert type(open_source(f"{path}:Net").build()).__name__ == "Net"
    instance = open_source(f"{path}:small")
    first, second = instance.build(), instance.build()
    assert first is not second and torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.py:absent", "has no absent"),
        ("model.py:needs", "needs arguments: width"),
        ("helpers.py", "has no build_model"),
        ("missing.py", "does not exist"),
        ("nowhere", "does not exist"),
        ("parts", "holds no config.json"),
    ],
)
def test_wrong_entries(tmp_path, monkeypatch, name, message):
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        open_source(name)


def test_a_broken_file_shows_the_users_frames_only(tmp_path):
    (tmp_path / "model.py").write_text(
        "import torch\n\ndef build_model():\n    return torch.nn.Linear(3, -1, 'x', [])\n"
    )
    with pytest.raises(DBConvertError) as caught:
        open_source(str(tmp_path / "model.py")).build()
    text = caught.value.message
    assert "model.py" in text and "line 4" in text and "torch/nn" not in text
    (tmp_path / "model.py").write_text("def build_model(:\n")
    with pytest.raises(DBConvertError, match="SyntaxError"):
        open_source(str(tmp_path / "model.py"))
    (tmp_path / "model.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(DBConvertError, match="SystemExit"):
        open_source(str(tmp_path / "model.py"))
    (tmp_path / "model.py").write_text("def build_model():\n    return 3\n")
    with pytest.raises(DBConvertError, match=r"not an nn\.Module"):
        open_source(str(tmp_path / "model.py")).build()


def test_all_files_it_imports_are_copied_and_no_other(tmp_path):
    source = open_source(str(project(tmp_path / "a")))
    assert source.ref.files == ("model.py", "helpers.py", "parts/__init__.py", "parts/layers.py")
    source.copy_to(tmp_path / "copy")
    again = reopen_source(source.ref, [tmp_path / "empty", tmp_path / "copy"])
    assert type(again.build()).__name__ == "Net"


def test_two_folders_with_modules_of_one_name(tmp_path):
    paths = [project(tmp_path / name, width) for name, width in (("a", 16), ("b", 32))]
    widths = [open_source(str(path)).build()[0].out_features for path in [*paths, paths[0]]]
    assert widths == [16, 32, 16]


def test_changed_source_is_not_run(tmp_path):
    path = project(tmp_path / "a")
    ref = open_source(str(path)).ref
    path.write_text(path.read_text() + "\nraise RuntimeError('must not run')\n")
    with pytest.raises(DBConvertError, match="content has changed"):
        reopen_source(ref, [path.parent])
    with pytest.raises(DBConvertError, match="is missing"):
        reopen_source(ref, [tmp_path])


def test_example_inputs(tmp_path):
    path = tmp_path / "model.py"
    body = (
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n    def forward(self, image, scale=1.0):\n        return image * scale\n"
        "def build_model():\n    return Net()\n"
    )
    for given, names in (
        ("torch.ones(2, 3)", ["image"]),
        ("(torch.ones(2, 3), 2.0)", ["image", "scale"]),
        ("{'image': torch.ones(2, 3)}", ["image"]),
    ):
        path.write_text(f"{body}def example_inputs():\n    return {given}\n")
        source = open_source(str(path))
        assert list(source.example_inputs(source.build())) == names
    path.write_text(f"{body}def example_inputs():\n    return (torch.ones(2), 1, 2, 3)\n")
    source = open_source(str(path))
    with pytest.raises(DBConvertError, match="returns 4 values"):
        source.example_inputs(source.build())


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(64, 5))", [2, 3, 32, 32]),
        ("nn.Sequential(nn.Embedding(17, 8), nn.Linear(8, 5))", [2, 16]),
        ("nn.Sequential(nn.Linear(24, 5))", [2, 16, 24]),
        ("nn.Sequential(nn.Conv1d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30, 5))", [2, 3, 32]),
        ("nn.LSTM(6, 4)", [2, 16, 6]),
        ("nn.Sequential(nn.Conv1d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30, 5)).bfloat16()", [2, 3, 32]),
        ("nn.Sequential(nn.Embedding(17, 8), nn.Linear(8, 5)).double()", [2, 16]),
    ],
)
def test_inputs_are_guessed_and_tried(tmp_path, body, shape):
    path = tmp_path / "model.py"
    path.write_text(f"from torch import nn\ndef build_model():\n    return {body}\n")
    source = open_source(str(path))
    assert list(next(iter(source.example_inputs(source.build()).values())).shape) == shape


def test_unguessable_inputs_ask_for_an_example(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        assert x.shape[0] == 7\n"
        "        return x\ndef build_model():\n    return Net()\n"
    )
    source = open_source(str(path))
    with pytest.raises(DBConvertError, match="no example input") as caught:
        source.example_inputs(source.build())
    assert "example_inputs()" in caught.value.hint
