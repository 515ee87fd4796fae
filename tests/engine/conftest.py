"""A small ViT for the digits as a model.py, split once for all tests."""

import json
from pathlib import Path

import pytest
import torch

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.data_options import DataOptions, ImageOptions
from dbconvert.engine.loop import Loop
from dbconvert.recipe import SplitOptions

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = [
    "train.steps=4",
    "train.batch=32",
    "log.every=1",
    "eval.draws=1",
    "eval.sigmas=2",
]
ALONE = [*QUICK, "train.periphery=frozen-target"]


def saved_pipeline(folder, model, scheduler):
    """A denoiser and its schedule as diffusers keeps a pipeline of them."""
    model.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    return folder


def write_model(folder):
    folder.mkdir(exist_ok=True)
    text = (EXAMPLES / "vit.py").read_text()
    start = text.index("def build_model")
    small = "def build_model():\n    return ViT(size=8, patch=4, channels=1, classes=10, depth=5, width=16, heads=2)\n"
    (folder / "model.py").write_text(text[:start] + small)
    return folder / "model.py"


ROWS = """
import torch

class Rows:
    def __len__(self):
        return 48
    def __getitem__(self, index):
        picture = 0.1 * torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(index))
        picture[:, 3 * (index % 3)] += 1
        return {"images": picture, "label": index % 3}

def parts(name):
    return Rows()
"""


def bright_rows(folder, model_file):
    """A recipe of what any training learns soon: three classes of pictures, bright in another row each."""
    (folder / "rows.py").write_text(ROWS)
    (folder / "vit.py").write_text(model_file.read_text().replace("classes=10, depth=5", "classes=3, depth=2"))
    recipe = folder / "rows.yaml"
    recipe.write_text("source: vit.py\ntask: classification\ndata: {source: rows.py:parts, input: images}\n")
    return str(recipe)


def pulled_and_resumed(package, overrides, at, out):
    """A run that is pulled out before an update, and goes on from its last checkpoint."""
    whole = Loop.update

    def pulled(self, block, batch):
        if self.updates == at:
            raise KeyboardInterrupt
        return whole(self, block, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "update", pulled)
        dbconvert.train(str(package), overrides=overrides, out=out)
    return dbconvert.train(str(package), resume=True, out=out)


def same_weights(one, other):
    """Whether two runs of whole networks hold the same, to the bit."""
    a, b = (load_tensors(run.folder / "weights" / "network.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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
