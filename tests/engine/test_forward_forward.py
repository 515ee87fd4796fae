"""Forward-Forward: layers learn alone from goodness, predictions try every label; trained, resumed, loaded, refused."""

import json
import math

import pytest
import torch
from engine.conftest import EXAMPLES, QUICK, bright_rows, pulled_and_resumed, same_weights

import dbconvert
from dbconvert.engine.forward_forward import layer_losses, learn, lone_loss, scores, without_readout
from dbconvert.engine.load import load
from dbconvert.engine.method import baseline_parameters
from dbconvert.engine.outline import outline
from dbconvert.errors import UsageError

FF = [*QUICK, "train.method=forward-forward"]


@pytest.fixture(scope="module")
def trained(package, tmp_path_factory):
    return dbconvert.train(str(package), overrides=FF, out=str(tmp_path_factory.mktemp("ff") / "run"))


@pytest.fixture
def network(trained):
    loaded = load(trained.folder).network.train()
    learning = set(without_readout(loaded.plan, baseline_parameters(loaded, range(5))).values())
    for parameter in loaded.parameters():
        parameter.requires_grad_(parameter in learning)
    return loaded


BATCH = {"images": torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
LABELS = torch.tensor([0, 1, 2, 3, 4, 9])


def test_the_losses_of_a_layer_are_those_of_logistic_classification():
    losses = layer_losses(torch.tensor([2.0, 5.0, 2.0, 0.5]))
    expected = [2 * math.log(2), math.log1p(math.exp(-3)) + math.log1p(math.exp(-1.5))]
    assert losses.tolist() == pytest.approx(expected)


def test_no_gradient_passes_between_layers(network):
    def gradients():
        found = {name: p.grad.clone() for name, p in network.model.named_parameters() if p.grad is not None}
        network.zero_grad()
        return found

    torch.manual_seed(0)
    told = learn(network, BATCH, LABELS, lambda losses: losses.sum().backward())
    together, apart, losses = gradients(), {}, []
    for layer in range(network.plan.anatomy.depth):
        torch.manual_seed(0)
        alone = lone_loss(network, BATCH, LABELS, layer)
        alone.sum().backward()
        own = gradients()
        assert {network.plan.anatomy.layer_of(name) for name in own} == ({None, 0} if layer == 0 else {layer})
        apart.update(own)
        losses.append(alone.detach())
    assert together.keys() == apart.keys() and torch.allclose(told, torch.stack(losses).mean(0))
    assert all(torch.allclose(together[name], apart[name], atol=1e-6) for name in apart)
    learning = {name for name, parameter in network.model.named_parameters() if parameter.requires_grad}
    assert torch.is_grad_enabled() and learning == together.keys()
    assert "patches.weight" in learning and not learning & {"head.weight", "norm.weight", "dbconvert.target.weight"}


def test_wrong_labels_are_wrong(network, monkeypatch):
    seen = []
    monkeypatch.setattr(
        type(network.task), "clean", lambda self, model, labels: seen.append(labels) or self.table(model)[labels]
    )
    learn(network, BATCH, LABELS, lambda losses: None)
    right, wrong = seen[0].chunk(2)
    assert torch.equal(right, LABELS) and not (right == wrong).any() and wrong.max() < 10


def test_a_prediction_tries_every_label(network, trained):
    network.eval()
    found = scores(network, BATCH)
    assert found.shape == (6, 10) and torch.equal(scores(network, {"images": BATCH["images"][:2]}), found[:2])
    assert torch.allclose(load(trained.folder)({"images": BATCH["images"] * 0.375 + 0.5}), found, atol=1e-4)
    assert dbconvert.evaluate(str(trained.folder), part="test").metrics.keys() == {"accuracy", "loss"}


def test_it_learns(model_file, tmp_path):
    more = ["split.blocks=2", "train.steps=80", "train.batch=48", "optimizer.lr=0.01", "train.method=forward-forward"]
    run = dbconvert.train(bright_rows(tmp_path, model_file), overrides=more, out=str(tmp_path / "run"))
    assert run.metrics["accuracy"] > 0.9


def test_it_resumes_to_the_bit(package, trained, tmp_path):
    again = pulled_and_resumed(package, [*FF, "train.checkpoint_every=2"], 3, str(tmp_path / "run"))
    assert same_weights(trained, again)
    assert json.loads((again.folder / "run.json").read_text())["updates"] == 4


def test_one_layer_at_a_time_is_kept(package):
    alone = outline(str(package), overrides=FF).memory.largest
    whole = outline(str(package), overrides=QUICK).controls["end-to-end"].largest
    assert alone.activations < 0.6 * whole.activations and alone.trainable < whole.trainable


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("ar_text_tiny", [], "one label an example"),
        ("dit_digits", [], "one label an example"),
        ("vit_digits", ["train.checkpointing=true"], "no use in train.method=forward-forward"),
    ],
)
def test_what_it_is_not_for(quick_splits, recipe, overrides, message):
    path = str(EXAMPLES.parent / "recipes" / f"{recipe}.yaml")
    with pytest.raises(UsageError, match=message):
        outline(path, overrides=[*overrides, "train.method=forward-forward"])
