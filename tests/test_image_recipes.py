"""Recipes of diffusion transformers with the settings of the DiffusionBlocks paper: what they say, and that they run.

The numbers of PAPER are those that arXiv 2506.14202 gives for DiT-S/2 on CIFAR-10 and DiT-L/2 on ImageNet.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from small_vae import save_vae

import dbconvert
from dbconvert.engine.prepare import read_origin
from dbconvert.engine.sample import Sampling
from dbconvert.recipe import read_recipe
from dbconvert.sources.resolve import open_source

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Paper:
    """Of one model: the network, the training, and the millions of parameters that Peebles & Xie give."""

    layers: int
    width: int
    heads: int
    lr: float
    parameters: int


PAPER = {
    "dit_cifar10": Paper(12, 384, 6, 1e-4, 33),
    "dit_imagenet256": Paper(24, 1024, 16, 5e-5, 458),
}
NAMES = sorted(PAPER)
QUICK = ["train.batch=2", "train.steps=2", "log.every=1", "eval.sigmas=0", "eval.batch=8", "data.workers=0"]


def recipe_of(name):
    return ROOT / "recipes" / f"{name}.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_the_paper_says(name):
    paper, recipe = PAPER[name], read_recipe(recipe_of(name))
    assert (recipe.task, recipe.split.blocks, recipe.noise.overlap) == ("image_diffusion", 3, 0.05)
    assert (recipe.train.epochs, recipe.train.steps, recipe.train.batch) == (100, None, 512)
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.train.label_dropout) == ("adamw", paper.lr, 0.1)
    assert (recipe.data.latents is not None) == (name == "dit_imagenet256")
    assert "50,000 images, guidance 2.0 and 50 Euler steps" in recipe_of(name).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_its_network_is_the_papers(name):
    """Without its numbers; tests/test_shipped.py splits it."""
    paper = PAPER[name]
    model = open_source(read_origin(name, []).recipe.source).build_within(0)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    layer = model.layers[0]
    assert (len(model.layers), layer.attention.heads, model.head.in_features) == (
        paper.layers,
        paper.heads,
        paper.width,
    )
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(paper.parameters, abs=0.7)
    assert len(model.classes.weight) == {"dit_cifar10": 10, "dit_imagenet256": 1000}[name] + 1


# -- small networks and local pictures in their places -----------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Small networks of the recipes' kinds; CIFAR-10 as it lies on the hub, and pictures of any size in folders."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "dit.py").write_text((ROOT / "examples" / "dit.py").read_text())
    for name, paper in PAPER.items():
        text = (ROOT / "examples" / f"{name}.py").read_text()
        sizes = f"depth={paper.layers}, width={paper.width}, heads={paper.heads}"
        assert sizes in text
        (folder / f"{name}.py").write_text(text.replace(sizes, "depth=3, width=16, heads=2"))
    rows = np.random.default_rng(0).integers(0, 256, (12, 40, 50, 3), dtype=np.uint8)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    pictures = {"img": [Image.fromarray(row[:32, :32]) for row in rows], "label": [i % 10 for i in range(12)]}
    datasets.disable_progress_bars()
    for part in ("train", "test"):
        table = datasets.Dataset.from_dict(pictures, features=features)
        table.to_parquet(folder / "cifar10" / f"{part}-00000-of-00001.parquet")
    for part in ("train", "validation"):
        for index, row in enumerate(rows):
            file = folder / "imagenet" / part / f"n{index % 3:04d}" / f"{index}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row).save(file)
    save_vae(folder / "vae", channels=3)
    return folder


def stand_ins(name, place):
    """Latents of the tiny VAE have half the size of the pictures, and the network takes 32 x 32."""
    own = {
        "dit_cifar10": [f"data.source={place / 'cifar10'}"],
        "dit_imagenet256": [
            f"data.source={place / 'imagenet'}",
            "data.image.size=64",
            f"data.latents.vae={place / 'vae'}",
        ],
    }
    return [f"source={place / name}.py", *own[name], *QUICK]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_on_local_pictures(name, place, tmp_path):
    run = dbconvert.train(str(recipe_of(name)), overrides=stand_ins(name, place), out="run").folder
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    assert len(updates) == 6 and {line["lr"] for line in updates} == {PAPER[name].lr}
    found = dbconvert.evaluate(str(run), overrides=["eval.sigmas=0"])
    assert found.part == {"dit_cifar10": "test", "dit_imagenet256": "validation"}[name] and found.examples == 12
    assert all(map(math.isfinite, found.metrics.values()))
    dbconvert.sample(str(run), out="drawn", count=3, sampling=Sampling(steps=2, guidance=2.0))
    size = {"dit_cifar10": 32, "dit_imagenet256": 64}[name]
    with Image.open("drawn/0002.png") as image:
        assert image.size == (size, size)


@pytest.mark.slow
def test_a_recipe_runs_at_full_size_on_a_cpu(place, tmp_path):
    given = [*stand_ins("dit_cifar10", place)[1:], "train.steps=1"]
    run = dbconvert.train(str(recipe_of("dit_cifar10")), overrides=given, out="run").folder
    assert (run / "metrics.jsonl").read_text().count('"loss"') == 3
