"""Recurrent depth from the source to generated text: split, trained, resumed, assembled, evaluated; its baselines."""

import json
from pathlib import Path

import pytest
import torch
from engine.conftest import pulled_and_resumed
from safetensors import safe_open
from small_text import FOX, corpus_in, write_text

import dbconvert
from dbconvert.engine.generate import Decoding
from dbconvert.engine.outline import outline
from dbconvert.errors import DBConvertError, Refused, UsageError
from dbconvert.recipe import SplitOptions

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ["train.steps=6", "train.batch=8", "data.length=16", "eval.draws=1", "eval.sigmas=2", "log.every=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small Huginn of 4 rounds, a text, and its package."""
    folder = tmp_path_factory.mktemp("recurrent")
    source = (EXAMPLES / "huginn.py").read_text()
    (folder / "huginn.py").write_text(
        source.replace("width=96, heads=4, iterations=8", "width=16, heads=2, iterations=4")
    )
    write_text(folder)
    dbconvert.split(str(folder / "huginn.py"), out=str(folder / "package"))
    return folder


@pytest.fixture(scope="module")
def corpus(place):
    return corpus_in(place, *QUICK)


@pytest.fixture(scope="module")
def trained(place, corpus):
    return dbconvert.train(str(place / "package"), overrides=corpus, out=str(place / "run"))


def losses_of(run):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_package_says_how_the_core_is_run_once(place):
    plan = json.loads((place / "package" / "plan.json").read_text())
    assert (plan["task"], plan["blocks"], plan["target"]["placement"]) == ("recurrent", [[0, 1]], "state")
    loop = plan["target"]["loop"]
    assert loop["rounds"] == {"module": "", "name": "iterations"} and loop["prelude"] == ["tokens", "prelude.0"]


def test_a_run(trained):
    expected = {"loss_block_0", "loss_first", "loss_first_draw", "loss_zero", "accuracy_zero"}
    after = {f"loss_{begin}_after_{n}" for begin in ("zero", "draw") for n in (4, 8, 16)}
    assert expected | after <= trained.metrics.keys()
    assert trained.metrics["loss_zero_after_4"] == trained.metrics["loss_zero"]  # the network's own 4 rounds
    assert len(losses_of(trained)) == 6 and {unit.name for unit in trained.memory.units} == {"block-0"}


@pytest.mark.parametrize("overrides", [[], ["noise.per=position"], ["noise.refit=[0.3, 0.6]"]])
def test_training_lowers_the_loss(place, corpus, tmp_path, overrides):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {place / 'huginn.py'}\noptimizer: {{lr: 0.01}}\n")
    long = [*corpus, "train.steps=80", "data.validation=null", *overrides]
    losses = losses_of(dbconvert.train(str(recipe), overrides=long, out=str(tmp_path / "run")))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_checkpoint_evaluates_and_generates_alone(trained, corpus, tmp_path):
    path = dbconvert.assemble([str(trained.folder)], out=str(tmp_path / "fox.safetensors"))
    with safe_open(path, "pt") as file:
        assert "dbconvert.tokenizer" in file.metadata()
    found = dbconvert.evaluate(str(path), part="validation", overrides=[corpus[-2], "data.length=16", "eval.draws=1"])
    for name in ("loss_first", "loss_zero", "loss_draw_after_4", "accuracy_average"):
        assert found.metrics[name] == pytest.approx(trained.metrics[name], abs=1e-5)
    sampled = ["eval.samples=2", "eval.prompt=4", "eval.tokens=6", "eval.draws=1"]
    given = [corpus[-2], "data.length=16", *sampled]
    judged = dbconvert.evaluate(str(path), part="validation", overrides=given).metrics
    assert judged["nats_bound"] > 0 and any(name.startswith("repetition") or "distinct" in name for name in judged)
    text = "".join(dbconvert.generate(str(path), "the ", tokens=8))
    assert len(text) == 8 and set(text) <= set(FOX)
    drawn = Decoding(temperature=1.0, top_k=5, steps=2)
    one, two = ("".join(dbconvert.generate(str(path), "the ", tokens=9, decoding=drawn, seed=s)) for s in (1, 2))
    assert one != two
    logits = dbconvert.load(path)(torch.zeros(1, 5, dtype=torch.long))
    assert logits.shape == (1, 5, 128)


@pytest.mark.parametrize("method", ["blocks", "truncated-bptt"])
def test_interrupted_and_resumed_to_the_bit(place, corpus, tmp_path, monkeypatch, method):
    from dbconvert.engine.loop import Loop

    overrides = [*corpus, "train.checkpoint_every=2", f"train.method={method}", "eval.draws=0"]
    overrides += ["train.backpropagate=2"] if method != "blocks" else []
    expected = dbconvert.train(str(place / "package"), overrides=overrides, out=str(tmp_path / "whole"))
    whole = Loop.update

    def pulled(self, block, batch):
        if self.updates == 5:
            raise KeyboardInterrupt
        return whole(self, block, batch)

    monkeypatch.setattr(Loop, "update", pulled)
    with pytest.raises(KeyboardInterrupt):
        dbconvert.train(str(place / "package"), overrides=overrides, out=str(tmp_path / "r"))
    monkeypatch.undo()
    found = dbconvert.train(str(place / "package"), resume=True, out=str(tmp_path / "r"))
    assert found.metrics == expected.metrics and losses_of(found) == losses_of(expected)


@pytest.mark.parametrize("method", ["end-to-end", "shallow", "truncated-bptt"])
def test_baselines(place, corpus, tmp_path, method):
    overrides = [*corpus, f"train.method={method}"]
    overrides += ["train.backpropagate=2"] if method == "truncated-bptt" else []
    run = dbconvert.train(str(place / "package"), overrides=overrides, out=str(tmp_path / "run"))
    assert set(run.metrics) == {"accuracy", "loss"}
    found = dbconvert.evaluate(str(run.folder), part="validation")
    assert found.metrics["loss"] == pytest.approx(run.metrics["loss"], abs=1e-6)
    assert len("".join(dbconvert.generate(str(run.folder), "the ", tokens=5))) == 5
    network = dbconvert.load(run.folder).network
    calls = []
    network.model.core[0].register_forward_hook(lambda *_: calls.append(1))
    network.plain({"tokens": torch.zeros(1, 4, dtype=torch.long)})
    assert len(calls) == (1 if method == "shallow" else 4)


def test_what_each_form_holds(place, corpus):
    found = outline(str(place / "package"), overrides=[*corpus, "train.batch=32"])
    held = {method: memory.largest.activations for method, memory in found.controls.items()}
    assert held.keys() == {"end-to-end", "shallow", "truncated-bptt"}
    assert held["shallow"] < found.memory.largest.activations < held["end-to-end"] == held["truncated-bptt"]


def test_a_job_of_its_only_block(place, corpus, tmp_path):
    """A table of its own lets stem and readout be the block's."""
    package = str(tmp_path / "package")
    dbconvert.split(str(place / "huginn.py"), out=package, options=SplitOptions(table="fresh"))
    alone = [*corpus, "train.periphery=frozen-target"]
    run = dbconvert.train(package, overrides=alone, block=0, out=str(tmp_path / "block"))
    path = dbconvert.assemble([str(run.folder)], out=str(tmp_path / "one.safetensors"))
    found = dbconvert.evaluate(str(path), part="validation", overrides=[corpus[-2], "data.length=16", "eval.draws=1"])
    assert found.metrics["loss_zero"] == pytest.approx(run.metrics["loss_zero"], abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["train.method=truncated-bptt", "train.backpropagate=5"], "the core runs 4 times"),
        (["train.backpropagate=2"], "is for train.method=truncated-bptt"),
        (["data.documents=masked"], "documents cannot be kept apart"),
    ],
)
def test_wrong_requests(place, corpus, tmp_path, overrides, reason):
    with pytest.raises(DBConvertError, match=reason):
        dbconvert.train(str(place / "package"), overrides=[*corpus, *overrides], out=str(tmp_path / "r"))


def test_trained_on_its_own_states_and_resumed_to_the_bit(place, corpus, tmp_path):
    overrides = [*corpus, "train.z=mixed", "train.checkpoint_every=2"]
    whole = dbconvert.train(str(place / "package"), overrides=overrides, out=str(tmp_path / "whole"))
    again = pulled_and_resumed(place / "package", overrides, 3, str(tmp_path / "again"))
    assert again.metrics == whole.metrics and len(losses_of(whole)) == 6


def test_truncation_needs_a_loop(corpus, tmp_path):
    dbconvert.split(str(EXAMPLES / "gpt.py"), out=str(tmp_path / "p"), options=SplitOptions(blocks=2))
    with pytest.raises(UsageError, match="run again and again"):
        dbconvert.train(
            str(tmp_path / "p"), overrides=[*corpus, "train.method=truncated-bptt"], out=str(tmp_path / "r")
        )


def test_what_a_looped_network_cannot_be_split_into(place, tmp_path):
    with pytest.raises(UsageError, match="a looped core is not cut"):
        dbconvert.split(str(place / "huginn.py"), out=str(tmp_path / "p"), options=SplitOptions(blocks=2))
    source = (place / "huginn.py").read_text()
    (tmp_path / "fixed.py").write_text(source.replace("range(self.iterations)", "(0, 1, 2)"))
    with pytest.raises(Refused, match="nothing in the network says") as error:
        dbconvert.split(str(tmp_path / "fixed.py"), out=str(tmp_path / "p"))
    assert "attribute" in error.value.hint and not (tmp_path / "p").exists()
