"""Recipes with the settings of the DiffusionBlocks paper: what they say, and that they run, on files and from a hub.

The numbers of PAPER are those that arXiv 2506.14202 gives for its masked diffusion on text8 and its autoregressive
models on LM1B and OpenWebText.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import commands
import datasets
import fake_hub
import pytest
from tokenizer_files import save_bpe

import dbconvert
from dbconvert.engine.prepare import read_origin
from dbconvert.recipe import read_recipe
from dbconvert.sources.resolve import open_source

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Paper:
    """Of one model: the network, the cut, the training."""

    task: str
    layers: int
    width: int
    heads: int
    length: int
    blocks: int
    overlap: float
    batch: int
    lr: float
    warmup: int
    epochs: int
    vocabulary: int | None = None
    weight_decay: float | None = None


PAPER = {
    "ar_lm1b": Paper("causal_lm", 12, 768, 12, 256, 4, 0.1, 256, 3e-4, 2500, 10, vocabulary=32_000),
    "ar_openwebtext": Paper("causal_lm", 12, 768, 12, 3072, 4, 0.1, 256, 3e-4, 2500, 10, vocabulary=32_000),
    "mdm_text8": Paper("masked_lm", 12, 768, 12, 256, 3, 0.05, 256, 3e-4, 2000, 100, weight_decay=0.03),
}
HEADS = {
    "causal_lm": lambda model: model.config.num_attention_heads,
    "masked_lm": lambda model: model.layers[0].attention.heads,
}
NAMES = sorted(PAPER)


def recipe_of(name):
    return ROOT / "recipes" / f"{name}.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_the_paper_says(name):
    paper, recipe = PAPER[name], read_recipe(recipe_of(name))
    assert (recipe.task, recipe.split.blocks, recipe.noise.overlap) == (paper.task, paper.blocks, paper.overlap)
    assert (recipe.data.length, recipe.train.batch, recipe.train.epochs) == (paper.length, paper.batch, paper.epochs)
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("adamw", paper.lr)
    assert recipe.optimizer.warmup == paper.warmup and isinstance(recipe.optimizer.warmup, int)
    assert paper.weight_decay in (None, recipe.optimizer.weight_decay)
    if paper.task == "masked_lm":
        assert (recipe.noise.rule, recipe.noise.schedule) == ("mask", "linear")
    else:
        assert (recipe.noise.rule, recipe.noise.sigma_data) == ("edm", 0.5)
    assert recipe.data.streaming and (recipe.train.steps, recipe.train.method) == (None, "blocks")


@pytest.mark.parametrize("name", NAMES)
def test_its_network_is_the_papers(name):
    paper, recipe = PAPER[name], read_origin(name, []).recipe
    source = open_source(recipe.source)
    model = source.build()
    embedding = next(m for m in model.modules() if type(m).__name__ == "Embedding")
    layers = next(m for m in model.modules() if type(m).__name__ == "ModuleList")
    assert (len(layers), embedding.embedding_dim, HEADS[paper.task](model)) == (paper.layers, paper.width, paper.heads)
    assert paper.vocabulary in (None, embedding.num_embeddings) and embedding.num_embeddings >= 256
    assert source.longest() in (None, paper.length)


# -- small networks in the place of the paper's -----------------------------------------------------------------

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 280,
}
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "
ROWS = [TEXT[i % 40 :] + TEXT[: i % 30] for i in range(200)]
QUICK = ["train.batch=2", "data.length=16", "log.every=1", "eval.batch=64"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Small networks of the recipes' kinds and a text in three forms."""
    folder = tmp_path_factory.mktemp("paper")
    for name in ("llama_lm1b", "llama_openwebtext"):
        (folder / name).mkdir()
        settings = json.loads((ROOT / "examples" / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**settings, **SIZES}))
    written = (ROOT / "examples" / "rotary_encoder.py").read_text()
    small = written.replace("depth=12, width=768, heads=12", "depth=3, width=32, heads=2")
    assert small != written
    (folder / "rotary_encoder.py").write_text(small)
    table = datasets.Dataset.from_dict({"text": ROWS})
    datasets.disable_progress_bars()
    (folder / "some.txt").write_text("\n".join(ROWS))
    table.to_json(folder / "some.jsonl")
    table.to_parquet(folder / "some.parquet")
    return folder


def small_source(name, place):
    return f"source={place / Path(read_recipe(recipe_of(name)).source).name}"


@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_on_local_text(name, form, place, tmp_path):
    overrides = [small_source(name, place), f"data.source={place / 'some'}.{form}", "data.tokenizer=byte"]
    run = dbconvert.train(str(recipe_of(name)), overrides=[*overrides, *QUICK, "train.steps=2"], out="run").folder
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * PAPER[name].blocks
    assert sorted({line["lr"] for line in lines}) == pytest.approx([n * 3e-4 / PAPER[name].warmup for n in (1, 2)])
    found = dbconvert.evaluate(str(run))
    assert found.part == read_recipe(recipe_of(name)).data.test and found.examples > 5
    assert all(map(math.isfinite, found.metrics.values()))


# -- from the hub, as they stand --------------------------------------------------------------------------------

CARDS = {
    "ar_lm1b": "nothing",
    "ar_openwebtext": "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n  - name: train\n"
    f"    num_bytes: 1\n    num_examples: {len(ROWS)}\n---\n",
    "mdm_text8": "nothing",
}
FILES = {
    "ar_lm1b": {"plain_text/train/0000.parquet": ROWS, "plain_text/test/0000.parquet": ROWS[:30]},
    "ar_openwebtext": {"plain_text/train-00000-of-00001.parquet": ROWS},
    "mdm_text8": {
        f"data/{part}-00000-of-00001.parquet": ["".join(c for c in TEXT if c not in ".;") * times]
        for part, times in (("train", 90), ("validation", 5), ("test", 5))
    },
}


@pytest.mark.parametrize("name", ["ar_lm1b", pytest.param("ar_openwebtext", marks=pytest.mark.slow), "mdm_text8"])
def test_a_recipe_streams_from_the_hub_for_its_epochs(name, place, tmp_path):
    """A stand-in serves corpora as the hub lays them out, and the tokenizer; only the network and lengths are small."""
    hub = tmp_path / "hub"
    for file, rows in FILES[name].items():
        (hub / file).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"text": rows}).to_parquet(hub / file)
    save_bpe(hub)
    (hub / "README.md").write_text(CARDS[name])
    with fake_hub.serving(hub, tmp_path / "hf") as environment:
        overrides = [small_source(name, place), *QUICK[1:], "train.batch=64", "train.epochs=2"]
        commands.dbconvert("train", recipe_of(name), *overrides, "-o", "run", env={**os.environ, **environment})
        told = commands.as_json("eval", "run", "--json", env={**os.environ, **environment})
    tokens = [json.loads(file.read_text())["tokens"] for file in (tmp_path / "cache" / "tokens").glob("*.json")]
    updates = json.loads(Path("run/run.json").read_text())["updates"]
    assert updates // PAPER[name].blocks == 2 * (max(tokens) // 16 // 64)
    assert told["examples"] == min(tokens) // 16
    kept = json.loads(Path("run/tokenizer_used.json").read_text())
    assert (kept["kind"], kept["location"]) == (
        ("char", None) if name == "mdm_text8" else ("transformers", "hf-internal-testing/llama-tokenizer")
    )
    assert not list((tmp_path / "hf").rglob("*.arrow"))  # streamed: nothing but tokens is stored


@pytest.mark.slow
@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_at_full_size_on_a_cpu(name, form, place, tmp_path):
    length = ["data.length=64"] if name == "ar_openwebtext" else []
    given = [f"data.source={place / 'some'}.{form}", "data.tokenizer=byte", "train.batch=2", "train.steps=3", *length]
    commands.dbconvert("train", recipe_of(name), *given, "log.every=1", "-o", "run")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * PAPER[name].blocks and lines[-1]["memory_mb"] < 6000
