"""train.checkpointing: the same training, to rounding, of networks with dropout; the outline counts what it saves."""

from types import SimpleNamespace

import pytest
import torch
from engine.conftest import EXAMPLES, QUICK
from small_text import FOX

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.data_options import DataOptions
from dbconvert.engine.outline import outline
from dbconvert.engine.requests import refuse_stand_ins
from dbconvert.errors import UsageError
from dbconvert.recipe import Recipe, SplitOptions, TrainOptions

pytestmark = pytest.mark.usefixtures("quick_splits")
ON = "train.checkpointing=true"
BRIEF = [*QUICK, "train.steps=2", "data.validation=null"]


@pytest.fixture(scope="module")
def packages(model_file, tmp_path_factory, quick_splits):
    """A ViT with dropout, and a looped network of text."""
    folder = tmp_path_factory.mktemp("packages")
    vit = model_file.read_text().replace("width=16, heads=2", "width=16, heads=2, dropout=0.2")
    (folder / "vit.py").write_text(vit)
    data = DataOptions(source="digits")
    dbconvert.split(str(folder / "vit.py"), out=str(folder / "vit"), options=SplitOptions(blocks=2), data=data)
    looped = (EXAMPLES / "huginn.py").read_text()
    looped = looped.replace("width=96, heads=4, iterations=8", "width=16, heads=2, iterations=3")
    (folder / "huginn.py").write_text(looped)
    (folder / "fox.txt").write_text(FOX)
    dbconvert.split(str(folder / "huginn.py"), out=str(folder / "huginn"))
    return folder


def weights(package, out, overrides, block=None):
    run = dbconvert.train(str(package), overrides=[*BRIEF, *overrides], block=block, out=str(out))
    files = sorted((run.folder / "weights").iterdir())
    return {key: value for file in files for key, value in load_tensors(file).items()}


@pytest.mark.parametrize(
    ("name", "block", "overrides"),
    [
        ("vit", None, ["train.accumulate=2"]),
        ("vit", None, ["train.method=end-to-end"]),
        ("vit", 1, ["train.periphery=frozen-target"]),
        ("huginn", None, ["train.method=truncated-bptt", "train.backpropagate=2"]),
        ("huginn", None, []),
    ],
)
def test_training_is_the_same(packages, tmp_path, name, block, overrides):
    if name == "huginn":
        text = [f"data.source={packages / 'fox.txt'}", "data.tokenizer=char", "data.length=16", "train.batch=8"]
        overrides = [*overrides, *text]
    # Plain gradient descent: Adam's first updates are signs, which rounding may turn.
    overrides = [*overrides, "optimizer.name=sgd", "optimizer.lr=0.1"]
    plain = weights(packages / name, tmp_path / "plain", overrides, block)
    again = weights(packages / name, tmp_path / "again", [*overrides, ON], block)
    assert plain.keys() == again.keys()
    for key, value in plain.items():
        assert torch.allclose(again[key].float(), value.float(), atol=1e-6), key


def test_the_outline_counts_what_it_saves(packages):
    plain = outline(str(packages / "vit"), overrides=QUICK)
    saving = outline(str(packages / "vit"), overrides=[*QUICK, ON])
    for before, after in zip(plain.memory.units, saving.memory.units, strict=True):
        assert after.activations < before.activations and after.state == before.state
    whole, less = plain.controls["end-to-end"].largest, saving.controls["end-to-end"].largest
    assert less.activations < 0.45 * whole.activations


def test_parts_of_layers_that_blocks_have_their_own_of_are_refused():
    layers = (SimpleNamespace(path="layers.0"), SimpleNamespace(path="layers.1"))
    plan = SimpleNamespace(anatomy=SimpleNamespace(layers=layers))
    network = SimpleNamespace(periphery_tensors=lambda: {"layers.0.time.weight": 0, "head.weight": 0})
    network.is_template = lambda key: True
    refuse_stand_ins(plan, network, Recipe(source="x"))
    with pytest.raises(UsageError, match=r"layers.0.time.weight lies in a layer"):
        refuse_stand_ins(plan, network, Recipe(source="x", train=TrainOptions(checkpointing=True)))
