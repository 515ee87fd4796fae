"""What finished blocks bring to the next one, kept on disk: the same training, and nothing stale."""

import json
import shutil

import numpy as np
import pytest
import torch
from small_text import corpus_in, write_gpt

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.engine import kept_states
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.recipe import SplitOptions
from dbconvert.shipped import shipped

pytestmark = pytest.mark.usefixtures("one_thread", "quick_splits")
VIT = "def build_model():\n    return ViT(size=8, patch=4, channels=1, classes=10, depth=2, width=16, heads=2)\n"
ALONE = [
    "train.steps=4", "train.batch=16", "log.every=1", "eval.draws=1", "eval.sigmas=2", "data.validation=null",
    "train.periphery=frozen-target", "train.z=on-policy",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Packages of two blocks that hear features, or nothing, and a finished block 0 of each."""
    folder = tmp_path_factory.mktemp("kept")
    text = shipped("examples/vit.py").read_text()
    (folder / "vit.py").write_text(text[: text.index("def build_model")] + VIT)
    write_gpt(folder, depth=2)
    given = {"vit": ["data.source=digits"], "gpt": corpus_in(folder)}
    for name, source, context in (
        ("features", "vit.py", "features"), ("raw", "vit.py", "raw"), ("estimate", "gpt.py", "estimate"),
    ):  # fmt: skip
        options = SplitOptions(blocks=2, context=context, table="fresh")
        dbconvert.split(str(folder / source), out=str(folder / name), options=options)
        data = given["gpt" if source == "gpt.py" else "vit"]
        dbconvert.train(str(folder / name), overrides=[*data, *ALONE], block=0, out=str(folder / f"{name}-0"))
    return folder, given


def train(place, name, out, *more, package=None, block=1):
    folder, given = place
    data = given["gpt" if name == "estimate" else "vit"]
    after = [f"train.after=[{folder / f'{name}-0'}]"] if not any("train.after" in one for one in more) else []
    package = str(package or folder / name)
    return dbconvert.train(package, overrides=[*data, *ALONE, *after, *more], block=block, out=str(out))


def weights(made):
    return load_tensors(made.folder / "weights" / "block-1.safetensors")


@pytest.mark.parametrize("name", ["features", "raw", "estimate"])
def test_training_on_kept_states_is_training(place, tmp_path, monkeypatch, name):
    """The same weights; earlier blocks run once an example, and then never again."""
    live, ran = weights(train(place, name, tmp_path / "live")), []
    plain = BlockwiseNetwork.denoise

    def spied(self, block, inputs, *args, **kwargs):
        ran.append(block)
        return plain(self, block, inputs, *args, **kwargs)

    states = f"train.states={tmp_path / 'states'}"
    first = weights(train(place, name, tmp_path / "first", states))
    monkeypatch.setattr(BlockwiseNetwork, "denoise", spied)
    monkeypatch.setattr(kept_states, "write", None)
    again = weights(train(place, name, tmp_path / "again", states))
    assert ran.count(0) == 1  # the measurement of memory before
    for key, value in live.items():
        assert torch.equal(first[key], again[key]) and torch.allclose(value, first[key], atol=1e-5), key


def test_what_is_kept_is_announced_and_is_as_large_as_that(place, tmp_path):
    notes = []
    folder, given = place
    overrides = [*given["vit"], *ALONE, f"train.after=[{folder / 'features-0'}]", f"train.states={tmp_path / 's'}"]
    dbconvert.train(
        str(folder / "features"), overrides=overrides, block=1, out=str(tmp_path / "r"), report=notes.append
    )
    told = next(note.text for note in notes if "states of" in getattr(note, "text", ""))
    z, heard = np.load(tmp_path / "s" / "z.npy"), np.load(tmp_path / "s" / "heard.npy")
    assert z.shape == (1197, 16) and heard.shape == (1197, 1, 5, 16)
    assert told == f"states of 1197 examples: {dbconvert.amounts.size(z.nbytes + heard.nbytes)} in {tmp_path / 's'}"
    sheet = json.loads((tmp_path / "s" / "states.json").read_text())
    assert sheet["block"] == 1 and list(sheet["weights"]) == ["block-0.safetensors"] and sheet["examples"] == 1197


def test_nothing_is_written_where_there_is_no_room(place, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(1, 1, 1000)
    monkeypatch.setattr(kept_states.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DBConvertError, match="no room for states of 1197 examples"):
        train(place, "features", tmp_path / "r", f"train.states={tmp_path / 's'}")
    assert not (tmp_path / "s").exists() and not list(tmp_path.glob(".s*"))


def test_states_of_other_weights_or_data_are_refused(place, tmp_path):
    folder, _ = place
    states = f"train.states={tmp_path / 's'}"
    train(place, "features", tmp_path / "r", states)
    with pytest.raises(DBConvertError, match="holds other states than this training wants: another data"):
        train(place, "features", tmp_path / "other", states, "data.train=test")
    shutil.copytree(folder / "features", tmp_path / "package")
    other = train(
        place, "features", tmp_path / "b0", "train.steps=1", "train.after=[]", package=tmp_path / "package", block=0
    )
    with pytest.raises(DBConvertError, match=r"this training wants: block-0.safetensors has moved on\n.*made again"):
        train(place, "features", tmp_path / "r1", states, f"train.after=[{other.folder}]")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="mine exists already and holds no states"):
        train(place, "features", tmp_path / "r2", f"train.states={tmp_path / 'mine'}")


@pytest.mark.parametrize(
    ("overrides", "block", "why"),
    [
        (["train.z=noised"], 1, r"with train.z=noised they depend on noise, drawn anew in every update"),
        (["data.flip=true"], 1, "the pictures' augmentation of an example are drawn anew in every update"),
        (["train.after=[]"], 0, "they are kept for a block that trains alone, after finished ones"),
    ],
)
def test_states_that_would_be_wrong(place, tmp_path, overrides, block, why):
    with pytest.raises(UsageError, match=f"and here it cannot\n.*{why}"):
        train(place, "features", tmp_path / "r", f"train.states={tmp_path / 's'}", *overrides, block=block)


def test_data_that_is_not_the_same_twice(place, tmp_path):
    (tmp_path / "rows.py").write_text(
        "import torch\n\nclass Rows:\n    def __len__(self):\n        return 48\n    def __getitem__(self, i):\n"
        "        return {'image': torch.rand(1, 8, 8), 'label': i % 10}\n\ndef parts(name):\n    return Rows()\n"
    )
    more = [f"train.states={tmp_path / 's'}", f"data.source={tmp_path / 'rows.py'}:parts", "data.input=image"]
    with pytest.raises(UsageError, match="the data gives other examples under the same numbers every time"):
        train(place, "features", tmp_path / "r", *more)
