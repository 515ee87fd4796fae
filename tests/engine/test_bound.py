"""The bound of a text's likelihood: on a toy whose best denoiser is known, on real networks, and through eval."""

import json
import math
from types import SimpleNamespace

import commands
import pytest
import torch
from language import causal_network
from small_text import write_gpt

import dbconvert
from dbconvert.diffusion.entropy import fit_entropy
from dbconvert.diffusion.intervals import Intervals, boundaries
from dbconvert.engine.bound import Bound, perplexity
from dbconvert.engine.chunks import in_chunks
from dbconvert.recipe import SplitOptions
from dbconvert.tasks.causal_lm import CausalLM
from tests.acceptance.table import CONVERTED

PRIOR = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
ENTROPY = float(-(PRIOR * PRIOR.log()).sum())
TABLE = torch.eye(len(PRIOR))


class ToyTask:
    """Targets are orthonormal, tokens independent of each other: nothing is to be learnt but the prior."""

    corrupt = CausalLM.corrupt
    losses = CausalLM.losses

    def table(self, model):
        return TABLE

    def denoised(self, model, output):
        return output.softmax(-1) @ TABLE

    def clean(self, model, labels):
        return TABLE[labels]

    def counted(self, labels):
        return torch.ones(labels.shape)

    def target_shape(self, inputs):
        return (*inputs["tokens"].shape, len(TABLE))

    def draw(self, inputs, *, generator):
        return torch.randn(self.target_shape(inputs), generator=generator)


class Toy:
    """The posterior mean in closed form, its scores times `sharpness`: 1 is the best denoiser."""

    model, task, plan = None, ToyTask(), SimpleNamespace(context="raw")

    def __init__(self, sharpness=1.0):
        self.sharpness, self.served = sharpness, []

    def told(self, block, inputs, labels, z, sigma, measure, before):
        assert before is None
        self.served.append((block, float(sigma.min()), float(sigma.max())))
        scores = self.sharpness * (z @ TABLE.T / sigma[:, None, None] ** 2 + PRIOR.log())
        return in_chunks(lambda features: features, measure, scores, labels, len(TABLE))


def intervals_of(blocks):
    distribution = fit_entropy(TABLE, PRIOR).distribution
    return Intervals(distribution, tuple(boundaries(distribution, blocks)), overlap=0.3)


def toy_batches(count=40, size=64):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        tokens = torch.multinomial(PRIOR, size * 16, replacement=True, generator=generator).view(size, 16)
        yield {"tokens": tokens}, tokens


def measured(toy, blocks=3, draws=4):
    return Bound(toy, intervals_of(blocks), draws, 0).measure(toy_batches(), 2.0)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_best_denoiser_reaches_the_entropy_and_not_less(blocks):
    found = measured(Toy(), blocks)
    apart = found["nats_bound"] - ENTROPY
    assert -2 * found["nats_bound_error"] < apart < 0.03 * ENTROPY
    assert found["nats_bound_error"] < 0.01 * ENTROPY
    assert found["perplexity_bound"] == pytest.approx(math.exp(found["nats_bound"]))
    assert found["bits_per_character"] == pytest.approx(found["nats_bound"] / math.log(2) / 2)
    assert found["bits_per_character_low"] < found["bits_per_character"] < found["bits_per_character_high"]
    shares = [value for name, value in found.items() if name.startswith("nats_block_")]
    assert len(shares) == (blocks if blocks > 1 else 0)
    assert not shares or sum(shares) == pytest.approx(found["nats_bound"])


def test_the_error_is_that_of_the_estimate():
    """Over seeds, estimates lie as far apart as one of them says, or nearer: the text is the same."""
    found = [Bound(Toy(), intervals_of(3), 1, seed).measure(toy_batches(4)) for seed in range(40)]
    nats = torch.tensor([one["nats_bound"] for one in found])
    assert float(nats.std()) < 1.3 * found[0]["nats_bound_error"]
    exact = Bound(Toy(), intervals_of(3), 64, 0).measure(toy_batches(4))
    assert (
        abs(float(nats.mean()) - exact["nats_bound"]) < 4 * float(nats.std()) / 40**0.5 + exact["nats_bound_error"] / 4
    )


@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_a_worse_denoiser_has_a_larger_bound(sharpness):
    best, worse = measured(Toy()), measured(Toy(sharpness))
    assert worse["nats_bound_low"] > best["nats_bound_high"]


def test_every_level_is_served_once_by_its_owner():
    toy = Toy()
    measured(toy)
    owned = intervals_of(3)
    for block in range(3):
        low, high = owned.owned(block)
        levels = [(a, b) for served, a, b in toy.served if served == block]
        assert min(a for a, _ in levels) >= low * (1 - 1e-6) and max(b for _, b in levels) <= high * (1 + 1e-6)
        assert min(a for a, _ in levels) < low * 1.05 and max(b for _, b in levels) > high / 1.05


def test_a_bound_that_no_perplexity_can_tell():
    assert perplexity({"nats_bound": 1e5, "nats_bound_error": 1.0, "nats_bound_high": 1e5 + 2}) == {}


@torch.no_grad()
def test_a_network_that_knows_only_how_many_tokens_there_are(monkeypatch):
    """Chunked and whole agree; a network that says nothing has a bound above the logarithm of its tokens."""
    network, intervals = causal_network(CONVERTED["hf_llama"])
    network.model.get_submodule(network.plan.anatomy.head.module).weight.zero_()
    tokens = torch.randint(0, network.task.target.classes, (6, 10), generator=torch.Generator().manual_seed(0))
    argument = network.plan.anatomy.embedding.argument
    bound = Bound(network, intervals, 2, 0)
    whole = bound.measure([({argument: tokens}, tokens)])
    assert whole["nats_bound"] > math.log(network.task.target.classes) and "bits_per_character" not in whole
    monkeypatch.setattr("dbconvert.engine.chunks.SCORES", 3 * network.task.target.classes)
    assert bound.measure([({argument: tokens}, tokens)]) == pytest.approx(whole, rel=1e-5)


def test_eval_tells_it(tmp_path):
    write_gpt(tmp_path, depth=4)
    dbconvert.split(str(tmp_path / "gpt.py"), out=str(tmp_path / "package"), options=SplitOptions(blocks=2))
    data = [f"data.source={tmp_path / 'fox.txt'}", "data.tokenizer=char", "data.length=16", "data.validation=null"]
    training = ["train.steps=2", "train.batch=8", *data]
    dbconvert.train(str(tmp_path / "package"), overrides=training, out=str(tmp_path / "run"))
    asked = ["eval", tmp_path / "run", "--json", "eval.sigmas=0", "eval.draws=2"]
    found = json.loads(commands.dbconvert(*asked).stdout)["metrics"]
    names = {"nats_bound", "nats_bound_error", "perplexity_bound_low", "bits_per_character_high", "nats_block_1"}
    assert names <= found.keys()
    assert found["bits_per_character"] == pytest.approx(found["nats_bound"] / math.log(2), rel=0.02)
    assert sum(found[f"entropy_share_block_{b}"] for b in range(2)) == pytest.approx(1)
    assert not any(
        "bound" in name
        for name in dbconvert.evaluate(str(tmp_path / "run"), overrides=["eval.draws=0", "eval.sigmas=0"]).metrics
    )
