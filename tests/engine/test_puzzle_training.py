"""Labels of every position from split to eval: puzzles, baselines, what blocks hear, and a run that is pulled out."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from engine.conftest import pulled_and_resumed

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.engine.estimate import estimate
from dbconvert.engine.estimate_records import Request
from dbconvert.engine.load import load
from dbconvert.engine.outline import outline
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.plan import read_plan
from dbconvert.recipe import SplitOptions, read_recipe
from dbconvert.tasks.token_classification import ASKED

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ["train.steps=3", "train.batch=8", "log.every=1", "eval.draws=1", "eval.sigmas=2"]
RECIPE = """
source: model.py
task: token_classification
split: {blocks: 3, start: original}
data: {source: s3, puzzle: {size: 6, examples: 64}}
"""
ON_POLICY = ["split.context=features", "train.z=mixed"]


@pytest.fixture(scope="module", autouse=True)
def quick(quick_splits):
    pass


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe on a tiny causal CNN."""
    folder = tmp_path_factory.mktemp("puzzle")
    text = (EXAMPLES / "s3.py").read_text()
    (folder / "model.py").write_text(text.replace("elements=6, depth=6, width=64", "elements=6, depth=3, width=16"))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def run(recipe):
    return dbconvert.train(str(recipe), overrides=[*QUICK, *ON_POLICY], out=str(recipe.parent / "run"))


def test_powers_of_a_permutation_are_eight_labels_a_position(recipe):
    def powers(name, *overrides):
        small = ["data.puzzle.examples=64", "split.blocks=2", *overrides]
        return dbconvert.train("permutation_powers", overrides=[*QUICK, *small], out=str(recipe.parent / name))

    found = powers("powers")
    assert 0 < found.metrics["accuracy_zero"] < 1
    assert load(found.folder)(torch.stack([torch.randperm(16) for _ in range(3)])).shape == (3, 16, 8, 16)
    one = f"source={EXAMPLES / 'permutation_powers.py'}:highest_power"
    with pytest.raises(DBConvertError, match="permutation-powers asks 8 of every position, and the network tells 1"):
        powers("one", one)
    assert "accuracy_zero" in powers("highest", one, "data.puzzle.single=true").metrics


def train(recipe, name, *overrides, **more):
    return dbconvert.train(str(recipe), overrides=[*QUICK, *overrides], out=str(recipe.parent / name), **more)


def test_a_run_is_evaluated_and_assembled(run, recipe):
    assert {"accuracy_zero", "accuracy_examples_zero", "loss_block_2", "accuracy_draw"} <= set(run.metrics)
    whole = dbconvert.assemble([str(run.folder)], out=str(recipe.parent / "model.safetensors"))
    found = dbconvert.evaluate(str(whole), overrides=["eval.draws=1"])  # the checkpoint says what its data was
    assert (found.source, found.part, found.examples) == ("s3", "test", 2_000)
    assert 0 < found.metrics["accuracy_zero"] < 1
    tokens = torch.randint(0, 6, (4, 6))
    scores = dbconvert.load(whole)(tokens)
    assert scores.shape == (4, 6, 6) and torch.equal(load(run.folder)(tokens), scores)


def test_a_network_can_be_told_which_positions_are_asked(run):
    network, tokens = load(run.folder), torch.randint(0, 6, (4, 6))
    asked = torch.arange(6).expand(4, 6) == 5
    assert not torch.equal(network({"tokens": tokens, ASKED: asked}), network(tokens))
    assert torch.equal(network({"tokens": tokens, ASKED: asked | True}), network(tokens))


@pytest.mark.parametrize(("method", "single"), [("end-to-end", "false"), ("shallow", "true")])
def test_baselines(recipe, method, single):
    found = train(recipe, method, f"train.method={method}", f"data.puzzle.single={single}")
    assert set(found.metrics) == {"accuracy", "accuracy_examples", "loss"}
    assert (found.metrics["accuracy"] == pytest.approx(found.metrics["accuracy_examples"])) is (single == "true")


@pytest.mark.parametrize(
    "overrides",
    [
        ["split.context=estimate", "train.z=on-policy", "data.puzzle.single=true", "train.accumulate=2"],
        ["noise.per=position", "noise.refit=[0.5]", "train.checkpointing=true", "train.precision=bf16"],
    ],
    ids=["estimate", "levels of positions"],
)
def test_forms_of_training(recipe, overrides):
    found = train(recipe, overrides[0], *overrides)
    assert 0 <= found.metrics["accuracy_zero"] <= 1
    lines = (found.folder / "metrics.jsonl").read_text().splitlines()
    assert {line["block"] for line in map(json.loads, lines) if "block" in line} == {0, 1, 2}


def test_a_pulled_run_ends_with_the_same_bits(run, recipe):
    overrides = [*QUICK, *ON_POLICY, "train.checkpoint_every=4"]
    again = pulled_and_resumed(recipe, overrides, at=6, out=str(recipe.parent / "pulled"))
    weights = [{file.name: load_tensors(file) for file in found.folder.glob("weights/*")} for found in (run, again)]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) == 4
    for name, tensors in weights[0].items():
        assert all(torch.equal(tensor, weights[1][name][key]) for key, tensor in tensors.items())


def test_one_block_is_a_job_of_its_own(recipe):
    package = recipe.parent / "package"
    source, options = str(recipe.parent / "model.py"), SplitOptions(context="raw")
    dbconvert.split(source, out=str(package), task="token_classification", options=options)
    own = ["train.z=noised", "train.periphery=frozen-target"]
    found = train(package, "alone", "data.source=s3", "data.puzzle.size=6", *own, block=1)
    assert set(found.metrics) == {"loss_block_1"} | {name for name in found.metrics if name.startswith("loss_sigma")}


def test_labels_of_positions_are_trained_on_what_the_blocks_before_deliver(recipe):
    """Unless it is asked for otherwise; the run, the package and an outline say what that is."""
    found = train(recipe, "default").folder
    assert read_plan(found / "package" / "plan.json").context == "features"
    assert [read_recipe(found / place).train.z for place in ("recipe.yaml", "package/recipe.yaml")] == ["on-policy"] * 2
    source, task = str(recipe.parent / "model.py"), "token_classification"
    alone = dbconvert.split(source, options=SplitOptions(blocks=1), task=task, dry_run=True)
    assert alone.plan.context == "raw"  # a single block hears nobody


def test_a_rehearsal_needs_no_data(recipe):
    package = ["data.source=null", "data.puzzle=null"]
    told, blind = (outline(str(recipe), overrides=[*QUICK, *overrides]).memory.units for overrides in ([], package))
    assert [unit.name for unit in told] == ["block-0", "block-1", "block-2"]
    for one, other in zip(told, blind, strict=True):  # six elements, and the twelve of the example input
        assert other.activations == pytest.approx(2 * one.activations, rel=0.1)


def test_estimate_takes_the_task_by_name(recipe):
    found = estimate(str(recipe.parent / "model.py"), request=Request(task="token_classification"))
    assert found.task == "token_classification" and [row.blocks for row in found.rows] == [None, 2, 3]
    with pytest.raises(UsageError, match="there is no task telepathy"):
        estimate(str(recipe.parent / "model.py"), request=Request(task="telepathy"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.method=forward-forward"], "is for one label an example, and the task is token_classification"),
        (["data.source=digits"], "data.puzzle is for s3, permutation-powers, automaton"),
        (["data.source=permutation-powers", "data.puzzle.size=7"], "has 7 tokens and 7 classes, and the network 6"),
        (["data.limit=9"], "data.limit is for text, and this task reads none"),
        (["data.tokenizer=byte"], "data.tokenizer is for text"),
        (["data.source=digits", "data.puzzle=null"], "the label of example 0 is no row of whole numbers"),
    ],
)
def test_what_does_not_fit_is_refused(recipe, overrides, message):
    with pytest.raises((UsageError, DBConvertError), match=message):
        train(recipe, f"refused {message[:20]}", *overrides)


# -- networks of Transformers -----------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "num_labels": 5, "use_cache": False,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_heads_of_transformers_are_split_unasked_and_trained(kind, tmp_path):
    name = f"{kind}ForTokenClassification"
    config = getattr(transformers, f"{kind}Config")(**TEXT, architectures=[name])
    config.save_pretrained(tmp_path / "model")
    options = SplitOptions(blocks=2, context="features")
    plan = dbconvert.split(str(tmp_path / "model"), out=str(tmp_path / "package"), options=options).plan
    assert (plan.task, plan.target.classes, plan.target.placement) == ("token_classification", 5, "positions")
    (tmp_path / "rows.py").write_text(ROWS)
    overrides = [*QUICK, f"data.source={tmp_path}/rows.py:parts", "train.z=on-policy"]
    found = dbconvert.train(str(tmp_path / "package"), overrides=overrides, out=str(tmp_path / "run"))
    assert {"accuracy_zero", "accuracy_examples_zero"} <= set(found.metrics)


ROWS = """
import torch

class Rows:
    def __len__(self):
        return 24
    def __getitem__(self, index):
        tokens = torch.randint(0, 61, (9,), generator=torch.Generator().manual_seed(index))
        labels = tokens % 5
        labels[7:] = -100
        return {"input_ids": tokens.tolist(), "label": labels.tolist()}

def parts(name):
    return Rows()
"""
