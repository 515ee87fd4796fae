"""NoProp-DT: coefficients of the posterior, blocks that learn alone, predictions; resumed, compared, refused."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from engine.conftest import EXAMPLES, QUICK, bright_rows, pulled_and_resumed, same_weights

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.engine import compare as comparing
from dbconvert.engine import noprop
from dbconvert.engine.cell import run_cell
from dbconvert.engine.compare import plan_comparison
from dbconvert.engine.grid import Request, lay_out, parse_vary
from dbconvert.engine.load import load
from dbconvert.engine.outline import outline
from dbconvert.errors import UsageError

NOPROP = [*QUICK, "train.method=noprop-dt"]
BATCH = {"images": torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
LABELS = torch.tensor([0, 1, 2, 3, 4, 9])


@pytest.fixture(scope="module")
def trained(package, tmp_path_factory):
    return dbconvert.train(str(package), overrides=NOPROP, out=str(tmp_path_factory.mktemp("noprop") / "run"))


@pytest.fixture
def network(trained):
    return load(trained.folder).network


# -- the schedule -----------------------------------------------------------------------------------------------


def test_the_schedule_goes_from_noise_to_nearly_none():
    shares = [noprop.kept(t, 4) for t in range(5)]
    assert shares == sorted(shares) and shares[0] == pytest.approx(0, abs=1e-30)
    assert shares[2] == pytest.approx(math.cos(math.pi / 2 * (0.5 + 0.008) / 1.008) ** 2)
    assert 1e-5 < 1 - shares[4] < 1e-3 and noprop.signal_to_noise(4, 4) == pytest.approx(shares[4] / (1 - shares[4]))


@pytest.mark.parametrize("blocks", [1, 3, 10])
def test_coefficients_are_those_of_the_posterior(blocks):
    """q(z_t|z_{t-1}, y) is q(z_{t-1}|z_t) q(z_t|y), normalised: a product of two normal densities of z_t."""
    for t in range(1, blocks + 1):
        before, after = noprop.kept(t - 1, blocks), noprop.kept(t, blocks)
        alpha = before / after
        precision = alpha / (1 - alpha) + 1 / (1 - after)
        told, clean = math.sqrt(alpha) / (1 - alpha) / precision, math.sqrt(after) / (1 - after) / precision
        assert noprop.coefficients(t, blocks) == pytest.approx((clean, told, 1 / precision))


# -- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 2])
def test_the_loss_of_a_block_is_its_term_of_the_bound(network, monkeypatch, block):
    table, seen = network.task.table(network.model), []
    scores = torch.randn(6, 10)
    monkeypatch.setattr(noprop, "predicted", lambda net, which, inputs, z: seen.append((which, z)) or scores)
    torch.manual_seed(1)
    found = noprop.losses(network, block, BATCH, LABELS)
    torch.manual_seed(1)
    share = noprop.kept(block, 3)
    z = share**0.5 * table[LABELS] + (1 - share) ** 0.5 * torch.randn(6, 16)
    assert seen[0][0] == block and torch.allclose(seen[0][1], z)
    step = noprop.signal_to_noise(block + 1, 3) - noprop.signal_to_noise(block, 3)
    expected = torch.stack([scores[i].softmax(0) @ table - table[label] for i, label in enumerate(LABELS)])
    assert torch.allclose(found, 3 / 2 * 0.1 * step * expected.square().sum(1))


def test_a_block_learns_alone(network):
    trained = {id(tensor) for block in range(3) for tensor in noprop.learning(network, block).values()}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    noprop.losses(network, 1, BATCH, LABELS).sum().backward()
    found = {name for name, p in network.model.named_parameters() if p.grad is not None}
    learning = set(noprop.learning(network, 1))
    assert found == learning and {network.plan.anatomy.layer_of(name) for name in found} == {None, 2, 3}
    assert sum(name.startswith("dbconvert.periphery.1.") for name in found) > 5


def test_the_noisy_label_enters_as_it_is(network):
    seen, task = [], network.task
    entry = type(task).arriving
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(task), "arriving", lambda self, corruption: seen.append(entry(self, corruption)) or seen[-1])
        z = torch.randn(6, 16)
        scores = noprop.predicted(network, 0, BATCH, z)
    assert torch.equal(seen[0], z) and not torch.allclose(scores, noprop.predicted(network, 0, BATCH, 2 * z))


def test_it_learns(model_file, tmp_path):
    more = ["split.blocks=2", "train.steps=60", "train.batch=48", "optimizer.lr=0.01", "train.method=noprop-dt"]
    run = dbconvert.train(
        bright_rows(tmp_path, model_file), overrides=[*more, "log.every=1"], out=str(tmp_path / "run")
    )
    assert run.metrics["accuracy_zero"] > 0.9 and run.metrics["accuracy_draw"] > 0.9
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    for block in range(2):
        told = [line["loss"] for line in lines if line.get("block") == block]
        assert len(told) == 60 and sum(told[-5:]) < 0.5 * sum(told[:5])


def test_it_resumes_to_the_bit(package, trained, tmp_path):
    again = pulled_and_resumed(package, [*NOPROP, "train.checkpoint_every=3"], 7, str(tmp_path / "run"))
    assert same_weights(trained, again)
    assert json.loads((again.folder / "run.json").read_text())["updates"] == 12


# -- inference --------------------------------------------------------------------------------------------------


def test_a_prediction_takes_a_step_a_block(network, monkeypatch):
    """z_1 ... z_T by hand, and the classes' posterior under q(z_t|y)."""
    table = network.task.table(network.model).double()
    scores = torch.randn(3, 6, 10)
    monkeypatch.setattr(noprop, "predicted", lambda net, block, inputs, z: scores[block])
    for generator in (None, torch.Generator().manual_seed(3)):
        found = list(noprop.walk(network, BATCH, generator))
        again = torch.Generator().manual_seed(3)
        z = torch.zeros(6, 16) if generator is None else torch.randn(6, 16, generator=again)
        for t, output in enumerate(found, 1):
            a, b, c = noprop.coefficients(t, 3)
            eps = torch.zeros(6, 16) if generator is None else torch.randn(6, 16, generator=again)
            z = a * scores[t - 1].softmax(-1) @ table.float() + b * z + c**0.5 * eps
            share = noprop.kept(t, 3)
            away = (z.double()[:, None] - share**0.5 * table).square().sum(-1)
            density = -away / (2 * (1 - share))
            assert torch.allclose(output.double().softmax(-1), density.softmax(-1), atol=1e-3)
        assert len(found) == 3


def test_what_was_trained_is_what_predicts(trained, network):
    loaded = load(trained.folder)
    found = noprop.predict(network, BATCH)
    assert torch.equal(noprop.predict(network, {"images": BATCH["images"][:2]}).argmax(-1), found[:2].argmax(-1))
    assert torch.allclose(loaded({"images": BATCH["images"] * 0.375 + 0.5}), found, rtol=1e-3, atol=1e-2)
    kept = load_tensors(trained.folder / "weights" / "network.safetensors")
    assert torch.equal(kept["dbconvert.target.weight"], network.model.state_dict()["dbconvert.target.weight"])
    figures = dbconvert.evaluate(str(trained.folder), part="test").metrics
    assert {"accuracy_zero", "loss_zero", "accuracy_draw", "accuracy_average"} <= figures.keys()
    assert not any(name.startswith(("loss_block", "loss_sigma")) for name in figures)


# -- beside others ----------------------------------------------------------------------------------------------


def test_its_row(package, tmp_path, monkeypatch):
    asked = Request(
        str(package), tuple(QUICK), parse_vary(["eval.draws=1,2", "train.order=random,rotate"]), 1, ("noprop-dt",)
    )
    told = [one.cell.name for one in lay_out(asked, {})]
    assert told[6:] == ["NoProp-DT, eval.draws=1", "NoProp-DT, eval.draws=2"]
    folder, planned = plan_comparison(Request(str(package), tuple(QUICK), {}, 1, ("noprop-dt",)), str(tmp_path / "out"))
    monkeypatch.setattr(comparing, "spawn", lambda place: run_cell(place) and 0)
    row = comparing.run(folder, planned[-1])
    assert row.status == "done" and row.cell.name == "NoProp-DT"
    assert (row.figures["layers"], row.figures["updates"], row.figures["evaluations"]) == (2, 12, 3)
    assert row.quality == {
        "accuracy from z = 0": row.metrics["accuracy_zero"],
        "accuracy over draws": row.metrics["accuracy_draw"],
    }
    assert row.figures["peak_parameters"] > 2 * row.figures["peak_gradients"] > 0 and row.figures["activations"] > 0


def test_one_block_is_kept(package):
    memory = outline(str(package), overrides=NOPROP).memory
    whole = outline(str(package), overrides=[*QUICK, "train.method=end-to-end"]).memory
    again = outline(str(package), overrides=[*NOPROP, "train.checkpointing=true"]).memory
    assert [unit.name for unit in memory.units] == ["block-0", "block-1", "block-2"]
    assert memory.largest.activations < 0.6 * whole.largest.activations
    kept = [(b.activations, a.activations) for a, b in zip(memory.units, again.units, strict=True)]
    assert kept[0][0] < kept[0][1] and kept[1][0] < kept[1][1] and kept[2][0] == kept[2][1]  # a block of one layer


@pytest.mark.parametrize("recipe", ["ar_text_tiny", "dit_digits"])
def test_what_it_is_not_for(quick_splits, recipe):
    path = str(EXAMPLES.parent / "recipes" / f"{recipe}.yaml")
    with pytest.raises(UsageError, match="noprop-dt is for one label an example"):
        outline(path, overrides=["train.method=noprop-dt"])


@pytest.mark.parametrize("method", ["noprop-dt", "forward-forward"])
def test_one_process(package, tmp_path, monkeypatch, method):
    monkeypatch.setattr("dbconvert.engine.train.make_accelerator", lambda *_: SimpleNamespace(num_processes=2))
    with pytest.raises(UsageError, match=f"{method} runs in one process only"):
        dbconvert.train(str(package), overrides=[*QUICK, f"train.method={method}"], out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_no_block_by_itself(package):
    with pytest.raises(UsageError, match="does not train single blocks"):
        dbconvert.train(str(package), overrides=NOPROP, block=0)
