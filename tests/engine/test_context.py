"""Blocks that hear each other, from recipe to text: trained, resumed, assembled, evaluated, generated; and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import commands
import pytest
import torch
from small_text import corpus_in, write_gpt

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.engine.estimate_records import SETTINGS, Request, Setting
from dbconvert.engine.rehearsal import Case
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.plan import parse_plan
from dbconvert.recipe import SplitOptions, read_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
FORMS = [("features", "noised"), ("estimate", "noised"), ("raw", "on-policy"), ("features", "mixed")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small GPT, a text, and a package for each context."""
    folder = tmp_path_factory.mktemp("context")
    write_gpt(folder, depth=3)
    for context in ("raw", "features", "estimate"):
        options = SplitOptions(blocks=3, context=context)
        dbconvert.split(str(folder / "gpt.py"), out=str(folder / context), options=options)
    return folder


@pytest.fixture(scope="module")
def corpus(place):
    return corpus_in(place)


def trained(place, corpus, context, z, out, *more):
    return dbconvert.train(str(place / context), overrides=[*corpus, f"train.z={z}", *more], out=str(out))


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def run(request, place, corpus, tmp_path_factory):
    """(form, a run of it)."""
    return request.param, trained(place, corpus, *request.param, tmp_path_factory.mktemp("run") / "run")


def test_a_block_is_never_left_without_what_it_should_hear(place, corpus, tmp_path):
    made = trained(place, corpus, "features", "noised", tmp_path / "r", "train.steps=1", "data.validation=null")
    network = dbconvert.load(str(made.folder)).network
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(DBConvertError, match="block 1 was given nothing to hear"):
        network.denoise(1, {"tokens": tokens}, torch.zeros(1, 4, 16), torch.ones(1))


# -- from end to end --------------------------------------------------------------------------------------------


def test_a_checkpoint_evaluates_and_generates_as_its_run(run, corpus, tmp_path):
    _, made = run
    assert {"loss_block_2", "loss_first", "loss_zero", "accuracy_zero"} <= made.metrics.keys()
    path = dbconvert.assemble([str(made.folder)], out=str(tmp_path / "fox.safetensors"))
    overrides = [corpus[-2], "data.length=16", "eval.draws=1", "eval.sigmas=2"]
    found = dbconvert.evaluate(str(path), part="validation", overrides=overrides)
    assert found.metrics == pytest.approx(made.metrics, abs=1e-5)
    first, again = ("".join(dbconvert.generate(str(path), "the ", tokens=8, cache=cache)) for cache in (True, False))
    assert first == again and len(first) == 8


def test_what_listens_is_trained_with_its_block(run, place):
    (context, _), made = run
    weights = [load_tensors(made.folder / "weights" / f"block-{b}.safetensors") for b in range(3)]
    listening = [[name for name in block if ".context." in name] for block in weights]
    if context == "raw":
        assert listening == [[], [], []]
        return
    assert listening == [[], ["dbconvert.context.1.linear.weight"], ["dbconvert.context.2.linear.weight"]]
    assert all(block[name].any() for block, names in zip(weights, listening, strict=True) for name in names)


def test_interrupted_and_resumed_to_the_bit(run, place, corpus, tmp_path, monkeypatch):
    from dbconvert.engine.loop import Loop

    (context, z), made = run
    whole = Loop.update

    def pulled(self, block, batch):
        if self.updates == 7:
            raise KeyboardInterrupt
        return whole(self, block, batch)

    monkeypatch.setattr(Loop, "update", pulled)
    with pytest.raises(KeyboardInterrupt):
        trained(place, corpus, context, z, tmp_path / "r", "train.checkpoint_every=3")
    monkeypatch.undo()
    found = dbconvert.train(str(place / context), resume=True, out=str(tmp_path / "r"))
    assert found.metrics == made.metrics


def test_blocks_with_stems_of_their_own_hear_each_other(place, corpus, tmp_path):
    package = str(tmp_path / "p")
    options = SplitOptions(blocks=3, context="features", table="fresh")
    dbconvert.split(str(place / "gpt.py"), out=package, options=options)
    overrides = [*corpus, "train.periphery=frozen-target"]
    made = dbconvert.train(package, overrides=overrides, out=str(tmp_path / "r"))
    path = dbconvert.assemble([str(made.folder)], out=str(tmp_path / "fox.safetensors"))
    found = dbconvert.evaluate(str(path), part="validation", overrides=[corpus[-2], "data.length=16", "eval.draws=1"])
    assert found.metrics["loss_zero"] == pytest.approx(made.metrics["loss_zero"], abs=1e-5)


def test_the_weight_of_noise_goes_by_the_level_that_was_met(place, corpus, tmp_path, monkeypatch):
    from dbconvert.engine.block_training import Blocks

    seen, weight = [], Blocks.weight

    def spied(self, job, sigma):
        seen.append(sigma)
        return weight(self, job, sigma)

    monkeypatch.setattr(Blocks, "weight", spied)
    trained(place, corpus, "raw", "on-policy", tmp_path / "r", "train.weight=edm", "train.accumulate=2")
    noise = json.loads((tmp_path / "r" / "noise.json").read_text())["boundaries"]
    met = {round(value, 5) for sigma in seen for value in sigma.tolist()}
    assert met == {round(float(torch.tensor(level)), 5) for level in noise}


def test_noise_is_refitted_to_blocks_that_hear_each_other(place, corpus, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"source: {place / 'gpt.py'}\nsplit: {{blocks: 3, context: features}}\nnoise: {{refit: [0.5]}}\n")
    made = dbconvert.train(str(recipe), overrides=[*corpus, "train.steps=12"], out=str(tmp_path / "r"))
    assert "own cross-entropy" in json.loads((tmp_path / "r" / "noise.json").read_text())["basis"]
    assert 0 < made.metrics["nats_bound"] < 100


# -- what is said of it -----------------------------------------------------------------------------------------


def test_the_split_says_that_blocks_are_not_independent(place, tmp_path):
    told = commands.as_json("split", place / "gpt.py", "--context", "features", "-o", tmp_path / "p", "--json")
    assert told["context"] == "features" and "one trained alone wants their finished runs" in told["warnings"][0]
    readme = (tmp_path / "p" / "README.md").read_text()
    assert "not independent" in readme and "--block 1" in readme and "wants their finished runs" in readme
    assert json.loads((tmp_path / "p" / "plan.json").read_text())["context"] == "features"
    alone = (place / "raw" / "README.md").read_text()
    assert "--block 0" in alone and "With train.z=noised, the default, blocks need nothing of each other" in alone


def test_activations_count_what_is_heard(place, corpus):
    """The dry run measures the block's own pass, with the features that its linear map keeps."""
    from dbconvert.engine.outline import outline

    kept = {c: outline(str(place / c), overrides=corpus).memory for c in ("raw", "features")}
    raw, heard = ([unit.activations for unit in memory.units] for memory in kept.values())
    features = 8 * 2 * 16 * 16 * 4  # [N, 2S, d] in 32 bits
    assert heard[0] == raw[0] and all(raw[b] + features <= heard[b] < raw[b] + 3 * features for b in (1, 2))
    more = [f.trainable - r.trainable for f, r in zip(kept["features"].units, kept["raw"].units, strict=True)]
    assert more == [0, 16 * 16, 16 * 16]


@pytest.mark.parametrize("context", ["features", "estimate"])
def test_estimates_count_what_training_measures(place, corpus, context):
    from dbconvert.engine.outline import outline

    found = dbconvert.estimate(str(place / "gpt.py"), request=Request(case=Case(8, 16), context=context))
    assert [row.blocks for row in found.rows] == [None, 2, 3]
    three = found.rows[-1]
    assert three.before == 1.0 and set(three.holdings) == set(SETTINGS)
    memory = outline(str(place / context), overrides=corpus).memory
    held = three.holdings[Setting("resident", False)]
    assert held.activations == pytest.approx(memory.units[2].activations, rel=0.01)
    assert held.gradients == 4 * memory.units[2].trainable and held.parameters == 4 * memory.resident_parameters
    away = three.holdings[Setting("away", False)]
    assert held.gradients < away.parameters < held.parameters and away.optimizer == 2 * away.gradients


def test_a_looped_core_has_no_predecessor():
    with pytest.raises(UsageError, match="its predecessor is itself"):
        dbconvert.split(str(EXAMPLES / "huginn.py"), options=SplitOptions(context="features"), dry_run=True)


# -- masked text ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked(place):
    """A recipe on a tiny encoder."""
    source = (EXAMPLES / "encoder.py").read_text()
    start, end = source.index("    return Encoder("), source.index("def example_inputs")
    tiny = "    return Encoder(vocabulary=64, positions=16, depth=3, width=16, heads=2)\n\n\n"
    example = source[end:].replace("2 * 32).view(2, 32) % 128", "2 * 12).view(2, 12) % 64")
    (place / "encoder.py").write_text(source[:start] + tiny + example)
    (place / "masked.yaml").write_text(
        "source: encoder.py\ntask: masked_lm\nsplit: {blocks: 3}\n"
        "data: {source: fox.txt, tokenizer: char, length: 16, cache: cache}\n"
        "train: {steps: 4, batch: 8}\neval: {draws: 1}\n"
    )
    return str(place / "masked.yaml")


@pytest.mark.parametrize(("context", "z"), FORMS)
def test_masked_text_in_every_form(masked, place, tmp_path, context, z):
    overrides = [f"split.context={context}", f"train.z={z}"]
    made = dbconvert.train(masked, overrides=overrides, out=str(tmp_path / "r"))
    assert 0 < made.metrics["bits_per_character_low"] < made.metrics["bits_per_character"] < 8
    path = dbconvert.assemble([str(made.folder)], out=str(tmp_path / "m.safetensors"))
    source = [f"data.source={place / 'fox.txt'}", "eval.draws=1"]
    found = dbconvert.evaluate(str(path), part="validation", overrides=source)
    assert found.metrics == pytest.approx(made.metrics, rel=1e-5)
    assert len("".join(dbconvert.generate(str(path), "the ", tokens=8))) == 8


def test_masked_blocks_with_stems_of_their_own(masked, tmp_path):
    alone = ["train.periphery=frozen-target", "split.context=features", "train.z=mixed"]
    made = dbconvert.train(masked, overrides=alone, out=str(tmp_path / "r"))
    path = dbconvert.assemble([str(made.folder)], out=str(tmp_path / "m.safetensors"))
    assert len("".join(dbconvert.generate(str(path), "the ", tokens=8))) == 8
    with pytest.raises(UsageError, match="the estimate that blocks hear is told in the network's own embeddings"):
        dbconvert.train(masked, overrides=[*alone, "split.context=estimate"], out=str(tmp_path / "other"))


# -- what was there before --------------------------------------------------------------------------------------


def test_plans_and_recipes_without_these_words_mean_the_paper_s_form(place):
    data = json.loads((place / "raw" / "plan.json").read_text())
    plan = parse_plan(data, file="")
    assert data.pop("context") == "raw" and parse_plan(data, file="") == plan
    assert not any("context" in key for key in plan.shapes)
    recipe = place / "raw" / "recipe.yaml"
    older = recipe.with_name("older.yaml")
    kept = [line for line in recipe.read_text().splitlines() if line.strip() not in ("z: noised", "mixed: 0.5")]
    older.write_text("\n".join(kept))
    assert len(kept) == len(recipe.read_text().splitlines()) - 2
    now = read_recipe(recipe)
    assert read_recipe(older) == replace(now, train=replace(now.train, z=None))  # the task's own


# -- errors -----------------------------------------------------------------------------------------------------


def test_networks_without_an_estimate(tmp_path):
    """No task fits: what leaves the layers could be heard, but nothing says what is expected, and nothing trains."""
    source = tmp_path / "model.py"
    source.write_text((EXAMPLES / "gpt.py").read_text().replace("self.head(self.norm(x))", "self.norm(x)"))
    with pytest.raises(UsageError, match="a network without a task has no context `estimate`"):
        dbconvert.split(str(source), options=SplitOptions(context="estimate"), dry_run=True)


def test_one_block_hears_nothing(place):
    with pytest.raises(UsageError, match="there is only one"):
        dbconvert.split(str(place / "gpt.py"), options=SplitOptions(blocks=1, context="estimate"), dry_run=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.mixed=0.3", "train.mixed is the on-policy share"), ("train.z=off", "z"), ("train.mixed=2", "mixed")],
)
def test_recipes_that_make_no_sense(place, corpus, tmp_path, override, message):
    with pytest.raises(UsageError, match=message):
        dbconvert.train(str(place / "raw"), overrides=[*corpus, override], out=str(tmp_path / "r"))


def test_unknown_contexts(place):
    failed = commands.dbconvert("split", place / "gpt.py", "--context", "feature", "--dry-run", code=2)
    assert "context" in failed.stderr


def test_steps_that_pass_a_block_over(run, corpus):
    (context, _), made = run
    overrides = ["eval.steps=2", "eval.draws=1", "eval.sigmas=0"]
    if context == "raw":
        assert dbconvert.evaluate(str(made.folder), part="validation", overrides=overrides).metrics["loss_zero"] > 0
        return
    with pytest.raises(UsageError, match="2 steps leave out block 1"):
        dbconvert.evaluate(str(made.folder), part="validation", overrides=overrides)
