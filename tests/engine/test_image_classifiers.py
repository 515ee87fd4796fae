"""Convolutional classifiers, and ViTs whose label enters otherwise, through all verbs; the recipe for CIFAR-100 on a
mosaic."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import dbconvert
from dbconvert.data_options import DataOptions, ImageOptions
from dbconvert.errors import DBConvertError, Refused
from dbconvert.plan import read_plan
from dbconvert.recipe import SplitOptions

pytestmark = pytest.mark.usefixtures("quick_splits")
ROOT = Path(__file__).parents[2]
VIT = (ROOT / "examples" / "vit.py").read_text()
POOLED = VIT.replace("return self.head(self.norm(x)[:, 0])", "return self.head(self.norm(x).mean(1))")
SMALL = "\n\ndef small():\n    return ViT(size={size}, patch=4, channels={channels}, classes={classes}, depth=4, "
SMALL += "width=16, heads=2, dropout=0.1)\n"
QUICK = ["train.batch=32", "log.every=1", "eval.draws=1", "eval.sigmas=1", "train.checkpoint_every=0"]
DIGITS = DataOptions(source="digits", image=ImageOptions(mean=(0.5,), std=(0.375,)))


def written(folder, text, **sizes):
    (folder / "model.py").write_text(text + SMALL.format(**sizes))
    return str(folder / "model.py:small")


def losses(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("source", "entry", "readout", "stack"),
    [
        ("noprop_cnn.py:noprop_digits", "add", "pooled", "layers"),
        ("resnet.py", "add", "pooled", "stages.1"),
        (POOLED, "append", "pooled", "layers"),
    ],
)
def test_split_train_assemble_eval(source, entry, readout, stack, tmp_path):
    if source == POOLED:
        source = written(tmp_path, POOLED, size=8, channels=1, classes=10)
    else:
        source = str(ROOT / "examples" / source)
    assert dbconvert.inspect(source).stack == stack
    dbconvert.split(source, out="package", options=SplitOptions(blocks=3), data=DIGITS)
    plan = read_plan(Path("package/plan.json"))
    assert (plan.task, plan.target.placement, plan.target.readout) == ("classification", entry, readout)
    run = dbconvert.train("package", overrides=[*QUICK, "train.steps=14", "optimizer.lr=5e-3"], out="run").folder
    assert np.mean(losses(run)[-9:]) < np.mean(losses(run)[:9]) - 0.1
    assembled = dbconvert.assemble([str(run)], out="one.safetensors")
    assert dbconvert.evaluate(str(assembled)).metrics == dbconvert.evaluate(str(run)).metrics
    network = dbconvert.load(str(assembled))
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("source", ["noprop_cnn.py:noprop_digits", "resnet.py"])
def test_a_stage_of_one_block_alone_and_the_controls(source, tmp_path):
    source = str(ROOT / "examples" / source)
    dbconvert.split(source, out="package", options=SplitOptions(blocks=3), data=DIGITS)
    few = [*QUICK, "train.steps=2"]
    alone = dbconvert.train("package", overrides=[*few, "train.periphery=frozen-target"], block=1, out="alone")
    assert alone.metrics.keys() >= {"loss_block_1"}
    for method in ("end-to-end", "shallow"):
        run = dbconvert.train("package", overrides=[*few, f"train.method={method}"], out=method)
        assert 0 <= run.metrics["accuracy"] <= 1


def test_a_stage_of_a_transformers_resnet(tmp_path):
    """An activation stands on its stream: it begins as the original network."""
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 3],
        layer_type="basic",
        num_labels=10,
        architectures=["ResNetForImageClassification"],
    )
    config.save_pretrained(tmp_path / "resnet")
    with pytest.raises(Refused, match="dimensions change") as caught:
        dbconvert.inspect(str(tmp_path / "resnet"))
    assert "--stack resnet.encoder.stages.1.layers (2 layers)" in caught.value.hint
    options = SplitOptions(blocks=2, stack="resnet.encoder.stages.1.layers")
    plan = dbconvert.split(str(tmp_path / "resnet"), out="package", options=options, data=DIGITS).plan
    assert (plan.start, plan.target.placement, plan.anatomy.verdict) == ("original", "add", "restricted")
    few = [*QUICK, "train.steps=2", "train.batch=8", "data.image.size=32", "data.test=test", "data.validation=null"]
    run = dbconvert.train("package", overrides=few, out="run").folder
    assembled = dbconvert.assemble([str(run)], out="folder")
    assert dbconvert.load(str(assembled))(torch.rand(2, 1, 32, 32)).shape == (2, 10)


@pytest.fixture(scope="module")
def mosaics(tmp_path_factory):
    """Pictures of ten plain colours and their numbers, as CIFAR-100 would be laid out."""
    folder = tmp_path_factory.mktemp("mosaics")
    colours = np.random.default_rng(0).integers(0, 256, (10, 3), dtype=np.uint8)
    for part, rows in (("train", 16), ("test", 4)):
        labels = np.random.default_rng(1).integers(0, 10, rows * 8).astype(np.uint8)
        grid = colours[labels].reshape(rows, 8, 3).repeat(32, 0).repeat(32, 1)
        Image.fromarray(grid).save(folder / f"cifar100_{part}.jpg", quality=95)
        (folder / f"cifar100_{part}_labels.u8").write_bytes(labels.tobytes())
    return folder


@pytest.fixture(scope="module")
def recipe_run(mosaics, tmp_path_factory):
    """The recipe on a smaller network: what was asked for, and the run."""
    folder = tmp_path_factory.mktemp("cifar")
    source = written(folder, VIT, size=32, channels=3, classes=100)
    overrides = [f"source={source}", f"data.source={mosaics}", "data.tile=32", "data.validation=test"]
    overrides += ["train.steps=16", "optimizer.lr=4e-3", *QUICK]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbconvert.engine.split.draw_noise", lambda *_: None)
        recipe = str(ROOT / "recipes" / "vit_cifar100.yaml")
        return recipe, overrides, dbconvert.train(recipe, overrides=overrides, out=str(folder / "run"))


def test_the_recipe_for_cifar100_learns_from_a_mosaic(recipe_run):
    _, _, run = recipe_run
    plan = read_plan(run.folder / "package" / "plan.json")
    assert (plan.target.placement, plan.target.parameter) == ("replace", "cls_token")
    assert np.mean(losses(run.folder)[-9:]) < np.mean(losses(run.folder)[:9]) - 0.3
    found = dbconvert.evaluate(str(run.folder))
    assert (found.part, found.examples) == ("test", 32)


def test_its_augmented_run_resumes_to_the_bit(recipe_run, tmp_path, monkeypatch):
    recipe, overrides, straight = recipe_run
    from dbconvert.engine.loop import Loop

    kept, saved = [o for o in overrides if not o.startswith("train.checkpoint_every")], []

    def stop(self):
        save(self)
        saved.append(self.updates)
        raise KeyboardInterrupt

    save = Loop.save
    monkeypatch.setattr(Loop, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        dbconvert.train(recipe, overrides=[*kept, "train.checkpoint_every=20"], out="stopped")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    resumed = dbconvert.train(recipe, resume=True, out="stopped")
    assert saved == [20] and losses(resumed.folder) == losses(straight.folder)
    assert resumed.metrics == straight.metrics


def test_evaluating_on_pictures_of_another_size(recipe_run):
    _, _, run = recipe_run
    with pytest.raises(DBConvertError, match="fails on a batch of the data") as caught:
        dbconvert.evaluate(str(run.folder), overrides=["data.image.size=40"])
    assert "[1, 3, 40, 40]" in caught.value.where and "[2, 3, 32, 32]" in caught.value.where


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["data.tile=16"], r"has 128 labels, and cifar100_train.jpg has 512 tiles"),
        (["data.image.mode=L"], "mean has 3 numbers, and pictures have 1 channels"),
        (["data.image.mode=L", "data.image.mean=[0.5]", "data.image.std=[0.2]"], "fails on a batch of the data"),
        (["data.tile=null"], "holds mosaics"),
        (["data.source=nowhere"], "is not a folder"),
    ],
)
def test_what_does_not_fit_is_said_before_training(recipe_run, changed, message):
    recipe, overrides, _ = recipe_run
    with pytest.raises(DBConvertError, match=message):
        dbconvert.train(recipe, overrides=[*overrides, *changed], out="bad")
