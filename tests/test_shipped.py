"""Every recipe parses and its source splits; every example runs."""

from pathlib import Path

import pytest
import torch

import dbconvert
from dbconvert.engine.prepare import read_origin
from dbconvert.recipe import read_recipe
from dbconvert.sources.resolve import open_source

ROOT = Path(__file__).parents[1]
LARGE = {"huginn_lm1b", "ar_openwebtext", "vit_tiny_imagenet"}
"""Split as smaller ones are, and slowly: with 32 rounds, with 3,072 positions, with 85 million parameters."""
RECIPES = [
    pytest.param(path, marks=pytest.mark.slow) if path.stem in LARGE else path
    for path in sorted((ROOT / "recipes").glob("*.yaml"))
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe(path):
    origin = read_origin(path.stem, [])  # by its bare name, from anywhere
    recipe = origin.recipe
    assert recipe == read_origin(str(path), []).recipe
    source = recipe.source.partition(".py:")[0]
    assert Path(source).exists() or Path(source + ".py").exists()
    result = dbconvert.split(recipe.source, options=recipe.split, noise=recipe.noise, task=recipe.task, dry_run=True)
    verdict = "looped" if recipe.task == "recurrent" else "accepted"
    assert result.plan.task == recipe.task and result.plan.anatomy.verdict == verdict


def test_the_papers_settings_for_huginn():
    """METHOD: 2 prelude, 4 recurrent, 2 coda layers, 512 wide, 8 heads, 32 recurrences, 15 epochs."""
    recipe = read_recipe(ROOT / "recipes" / "huginn_lm1b.yaml")
    assert recipe.source == "../examples/huginn.py:huginn_lm1b"
    model = open_source(str(ROOT / "examples" / "huginn.py") + ":huginn_lm1b").build()
    assert (len(model.prelude), len(model.core), len(model.coda), model.iterations) == (2, 4, 2, 32)
    assert (model.tokens.weight.shape, model.core[0].attention.heads) == ((32_000, 512), 8)
    assert (recipe.train.epochs, recipe.train.batch, recipe.optimizer.lr) == (15, 256, 3e-4)


def test_the_papers_settings_for_cifar100():
    """METHOD: 12 layers, width 128, 4 heads, patch 4, dropout 0.1, B = 3, gamma 0.05, batch 128, 500 epochs."""
    recipe = read_recipe(ROOT / "recipes" / "vit_cifar100.yaml")
    plan = dbconvert.split(
        str(ROOT / "examples" / "vit.py:vit_cifar100"), options=recipe.split, noise=recipe.noise, dry_run=True
    ).plan
    assert (plan.anatomy.depth, plan.anatomy.width, len(plan.blocks)) == (12, 128, 3)
    assert (recipe.train.batch, recipe.train.epochs, recipe.optimizer.lr) == (128, 500, 5e-4)
    assert (recipe.noise.overlap, recipe.noise.rule, recipe.noise.sigma_data) == (0.05, "edm", 0.5)
    assert recipe.optimizer.schedule == "cosine" and recipe.optimizer.warmup == pytest.approx(10 / 500)
    assert recipe.data.flip and recipe.data.randaugment is not None
    model = open_source(str(ROOT / "examples" / "vit.py") + ":vit_cifar100").build()
    assert (model.layers[0].attention.heads, model.patches.kernel_size, model.layers[0].dropout.p) == (4, (4, 4), 0.1)
    assert recipe.split.entry == "replace" and plan.target.parameter == "cls_token"


def test_the_papers_settings_for_tiny_imagenet():
    """METHOD: 12 layers, width 768, B = 2, 100 epochs, batch 256, 1e-4."""
    recipe = read_recipe(ROOT / "recipes" / "vit_tiny_imagenet.yaml")
    model = open_source(str(ROOT / "examples" / "vit.py") + ":vit_tiny_imagenet").build()
    assert (len(model.layers), model.head.in_features, model.head.out_features) == (12, 768, 200)
    assert (recipe.split.blocks, recipe.train.epochs, recipe.train.batch) == (2, 100, 256)
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.data.test) == ("adamw", 1e-4, "valid")
    assert recipe.data.flip and recipe.data.randaugment is not None


def test_the_papers_settings_for_noprop():
    """METHOD: B = 3, gamma 0.1, AdamW 1e-4, 1000 epochs; depth and width are not given."""
    recipe = read_recipe(ROOT / "recipes" / "noprop_cifar100.yaml")
    assert (recipe.split.blocks, recipe.noise.overlap, recipe.train.epochs) == (3, 0.1, 1000)
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("adamw", 1e-4)
    assert open_source(str(ROOT / "examples" / "noprop_cnn.py")).build().head.out_features == 100


@pytest.mark.parametrize("name", ["build_model", "vit_cifar100"])
def test_example_networks_run(name):
    source = open_source(str(ROOT / "examples" / "vit.py") + f":{name}")
    model = source.build()
    with torch.no_grad():
        assert model(**source.example_inputs(model)).shape[0] == 2


def test_the_example_knows_nothing_of_dbconvert():
    assert "dbconvert" not in (ROOT / "examples" / "vit.py").read_text()
