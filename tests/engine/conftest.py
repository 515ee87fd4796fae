"""A small ViT for the digits as a model.py, split once for all tests."""

from pathlib import Path

import pytest

import dbconvert
from dbconvert.recipe import DataOptions, ImageOptions, SplitOptions

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = [
    "train.steps=4",
    "train.batch=32",
    "log.every=1",
    "eval.draws=1",
    "eval.sigmas=2",
]
ALONE = [*QUICK, "train.periphery=frozen-target"]


def write_model(folder):
    folder.mkdir(exist_ok=True)
    text = (EXAMPLES / "vit.py").read_text()
    start = text.index("def build_model")
    small = "def build_model():\n    return ViT(size=8, patch=4, channels=1, classes=10, depth=5, width=16, heads=2)\n"
    (folder / "model.py").write_text(text[:start] + small)
    return folder / "model.py"


@pytest.fixture(scope="module")
def quick_splits():
    """No pictures, which take most of a tiny split's time. Not together with `package`, made for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbconvert.engine.split.draw_noise", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def package(model_file, tmp_path_factory):
    """Five layers in three blocks, noise fitted to the digits."""
    folder = tmp_path_factory.mktemp("packages") / "small"
    data = DataOptions(source="digits", image=ImageOptions(mean=(0.5,), std=(0.375,)))
    dbconvert.split(str(model_file), out=str(folder), options=SplitOptions(blocks=3), data=data)
    return folder


@pytest.fixture(scope="session")
def run_of_all(package, tmp_path_factory):
    return dbconvert.train(str(package), overrides=QUICK, out=str(tmp_path_factory.mktemp("runs") / "all"))


@pytest.fixture(scope="session")
def runs_of_one(package, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [dbconvert.train(str(package), overrides=ALONE, block=b, out=str(folder / f"block{b}")) for b in range(3)]
