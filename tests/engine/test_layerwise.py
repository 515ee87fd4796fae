"""BAdam-style and LISA-style training: who learns when, with what state, to the bit, and what of it is counted."""

import json

import pytest
import torch
from engine.conftest import QUICK, bright_rows, pulled_and_resumed, same_weights

import dbconvert
from dbconvert.engine.loop import Loop
from dbconvert.engine.memory import activations
from dbconvert.errors import UsageError

TURNS = [*QUICK, "train.steps_per_turn=2", "optimizer.weight_decay=0"]
PARTS = ("parameters", "gradients", "optimizer")


def watched(package, out, *overrides):
    """A run, and before each of its updates: the keys that learn, the keys that have state, and all weights."""
    seen, update = [], Loop.update

    def told(self, block, batch):
        unit = self.job.units[block]
        before = {key: p.detach().clone() for key, p in unit.parameters.items()}
        loss = update(self, block, batch)
        learning = {key for key, p in unit.parameters.items() if p.requires_grad}
        moved = {key for key, p in unit.parameters.items() if not torch.equal(before[key], p)}
        state = {
            key: int(unit.optimizer.state[p]["step"]) for key, p in unit.parameters.items() if p in unit.optimizer.state
        }
        seen.append((learning, moved, state, self.job))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "update", told)
        run = dbconvert.train(str(package), overrides=[*TURNS, *overrides], out=str(out))
    return run, seen


@pytest.fixture(scope="module")
def badam(package, tmp_path_factory):
    return watched(package, tmp_path_factory.mktemp("badam") / "run", "train.method=badam", "train.steps=12")


@pytest.fixture(scope="module")
def lisa(package, tmp_path_factory):
    return watched(package, tmp_path_factory.mktemp("lisa") / "run", "train.method=lisa", "train.steps=8")


def places(job, keys):
    plan = job.network.plan
    return {("around" if plan.anatomy.layer_of(key) is None else plan.block_of_key(key)) for key in keys}


def test_blocks_take_turns_from_the_readout_to_the_stem_with_fresh_state(badam):
    _, seen = badam
    job = seen[0][-1]
    turns = [places(job, learning) for learning, *_ in seen]
    assert turns[::2] == turns[1::2] == [{"around"}, {2}, {1}, {0}, {"around"}, {"around"}]
    readout, stem = seen[0][0], seen[8][0]
    assert {"norm.weight", "head.weight"} <= readout and not readout & stem and seen[10][0] == readout
    assert set().union(*(learning for learning, *_ in seen)) == set(job.units[0].parameters)
    for number, (learning, moved, state, _) in enumerate(seen):
        assert moved <= learning == set(state) and set(state.values()) == {number % 2 + 1}
        assert number == len(seen) - 1 or moved  # the last update's learning rate is next to nothing


def test_layers_are_drawn_beside_what_always_learns(lisa):
    _, seen = lisa
    job, drawn, updates = seen[0][-1], [], dict.fromkeys(seen[0][-1].units[0].parameters, 0)
    for learning, moved, state, _ in seen:
        layers = {job.network.plan.anatomy.layer_of(key) for key in learning}
        assert None in layers and len(layers - {None}) == 2 and moved <= learning == set(state)
        updates = {key: count + 1 if key in learning else 0 for key, count in updates.items()}
        assert all(state[key] == updates[key] for key in state)
        drawn.append(layers)
    assert drawn[::2] == drawn[1::2] and len(set(map(frozenset, drawn))) > 1


@pytest.mark.parametrize("method", ["badam", "lisa"])
def test_a_pulled_run_goes_on_to_the_same_weights(method, package, badam, lisa, tmp_path):
    whole = {"badam": badam, "lisa": lisa}[method][0]
    steps = {"badam": 12, "lisa": 8}[method]
    asked = [*TURNS, f"train.method={method}", f"train.steps={steps}", "train.checkpoint_every=3"]
    assert same_weights(pulled_and_resumed(package, asked, 4, str(tmp_path / "run")), whole)


def test_what_an_update_holds_is_what_is_counted(badam, lisa, run_of_all):
    for run in (badam[0], lisa[0], run_of_all):
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        held = [line["holds"] for line in lines if "holds" in line]
        gradients = max(one["gradients"] for one in held)
        most = max(run.memory.units, key=lambda unit: unit.state)
        assert gradients == 4 * max(unit.trainable for unit in run.memory.units)
        assert held[0]["parameters"] == 4 * run.memory.used_parameters
        if run is not run_of_all:
            counters = 4 * 200  # a number a tensor
            assert 0 <= max(one["optimizer"] for one in held) - (most.state - 2 * gradients) < counters
    assert badam[0].memory.units[0].activations < lisa[0].memory.units[0].activations


def test_readout_alone_keeps_next_to_nothing_for_its_backward_pass(badam):
    run, seen = badam
    job = seen[0][-1]
    whole = activations(job, 0, torch.device("cpu"))
    job.method.turns = lambda job, block: [type(job.method).turns(job.method, job, block)[0]]
    try:
        assert 10 * activations(job, 0, torch.device("cpu")) < whole == run.memory.units[0].activations
    finally:
        del job.method.turns


def test_one_block_takes_no_turns(model_file, tmp_path, quick_splits):
    recipe = bright_rows(tmp_path, model_file)
    for method in ("badam", "lisa"):
        with pytest.raises(UsageError, match="the network is one block"):
            asked = [*QUICK, "split.blocks=1", f"train.method={method}"]
            dbconvert.train(recipe, overrides=asked, out=str(tmp_path / method))


def test_they_learn(model_file, tmp_path, quick_splits):
    recipe = bright_rows(tmp_path, model_file)
    asked = ["split.blocks=2", "train.steps=40", "train.batch=48", "train.steps_per_turn=4", "optimizer.lr=0.01"]
    for method in ("badam", "lisa"):
        out = str(tmp_path / method)
        dbconvert.train(recipe, overrides=[*asked, f"train.method={method}", "data.validation=null"], out=out)
        assert dbconvert.evaluate(out, part="test").metrics["accuracy"] == 1.0
