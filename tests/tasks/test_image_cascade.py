"""Blocks of image generators that hear each other, and the sampler's own noisy image."""

from functools import cache

import pytest
import torch
from cascades import Entered, blockwise, same
from small_dit import inputs, small_dit
from tasks.test_image_diffusion import Plain
from torch import nn

from dbconvert.engine.cascade import Cascade
from dbconvert.engine.denoising import Denoising
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.on_policy import FromTruth
from dbconvert.engine.sample import Sampling, draw
from dbconvert.errors import UsageError
from dbconvert.tasks.image_diffusion import ImageDiffusion

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXTS = ["features", "estimate"]
STEPS, BLOCKS, COUNT = 7, 3, 2
LABELS = torch.tensor([3, 7])


@cache
def built(context, name="dit"):
    if name == "dit":
        return blockwise(small_dit(), inputs(), ImageDiffusion, BLOCKS, context=context)
    torch.manual_seed(0)
    model = Plain()
    model.blocks = nn.ModuleList([*model.blocks, *Plain().blocks])
    given = {"x": torch.randn(2, 3, 16, 16), "t": torch.rand(2)}
    return blockwise(model, given, ImageDiffusion, BLOCKS, context=context)


class Watched:
    """Records z and level of every evaluation, while it is open."""

    def __init__(self, monkeypatch):
        self.seen = []
        plain = BlockwiseNetwork.denoise

        def spied(network, block, inputs, z, sigma, *args, **kwargs):
            self.seen.append((block, z, sigma))
            return plain(network, block, inputs, z, sigma, *args, **kwargs)

        monkeypatch.setattr(BlockwiseNetwork, "denoise", spied)


def drawn(network, intervals, **more):
    labels = LABELS if network.task.picture.labels else None
    return draw(network, intervals, COUNT, labels, Sampling(**{"steps": STEPS, **more}))


def given(network, z):
    named = {network.task.picture.argument: z}
    return {**named, **dict.fromkeys(network.task.picture.labels, LABELS)}


@pytest.mark.parametrize("name", ["dit", "plain"])
@pytest.mark.parametrize("context", ["raw", *CONTEXTS])
def test_training_at_the_sampler_s_state_meets_what_sampling_meets(monkeypatch, context, name):
    """To the bit: what the truth would be at the predecessors' last evaluations is taken from the sampler."""
    network, intervals = built(context, name)
    watched = Watched(monkeypatch)
    with Entered(network) as entered:
        drawn(network, intervals)
    evaluations = list(zip(watched.seen, entered.seen, strict=True))
    assert len(evaluations) == STEPS and {block for (block, *_), _ in evaluations} == set(range(BLOCKS))
    last = {block: (z, sigma) for (block, z, sigma), _ in evaluations}
    task = type(network.task)
    monkeypatch.setattr(task, "handover", lambda self, _, k: float(last[k][1][0]))
    monkeypatch.setattr(FromTruth, "level", lambda self, block, level: level)
    for block in (1, 2):
        (_, z, sigma), (_, *met) = next(each for each in evaluations if each[0][0] == block)
        chain = iter([last[k][0] for k in reversed(range(block))])
        monkeypatch.setattr(task, "noisier", lambda self, *_: next(chain))  # noqa: B023
        with Entered(network) as trained, torch.no_grad():
            nothing = torch.zeros_like(z)
            own = torch.ones(COUNT).bool()
            network(block, given(network, z), nothing, sigma, nothing, before=Cascade(intervals, own))
        assert trained.seen[-1][0] == block and torch.equal(watched.seen[-1][1], z)
        assert same(trained.seen[-1][1:], met)


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_is_heard_changes_what_is_drawn_and_is_each_image_s_own(context):
    network, intervals = built(context)
    images = drawn(network, intervals)
    hearing = [network.conditioning.get_parameter(f"context.{b}.linear.weight") for b in (1, 2)]
    kept = [weight.detach().clone() for weight in hearing]
    with torch.no_grad():
        for weight in hearing:
            weight.zero_()
        deaf = drawn(network, intervals)
        for weight, was in zip(hearing, kept, strict=True):
            weight.copy_(was)
    assert not torch.allclose(deaf, images, atol=1e-3)
    assert torch.allclose(drawn(network, intervals, batch=1), images, atol=1e-4)
    assert not torch.allclose(drawn(network, intervals, guidance=1.5), images, atol=1e-3)
    assert drawn(network, intervals, sampler="heun", steps=13).isfinite().all()


@torch.no_grad()
def test_the_expected_image_is_heard_as_the_stem_s_stream_of_it():
    network, intervals = built("estimate")
    z = torch.randn(COUNT, 1, 8, 8)
    sigma = torch.full((COUNT,), intervals.boundaries[-1])
    expected = network.denoise(0, given(network, z), z, sigma, tells=True)
    heard = network.delivered(expected, z, given(network, z))
    patches = expected / (network.sigma_data * (1 + 0.01**2) ** 0.5)
    model, first = network.model, network.plan.anatomy.layers[0].path
    seen = []
    hook = model.get_submodule(first).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.run.reset()
    model(images=patches, time=torch.zeros(COUNT), label=LABELS)
    hook.remove()
    assert torch.allclose(heard, seen[0], atol=1e-5)


def test_an_own_state_is_one_step_of_the_block_before_from_the_truth(monkeypatch):
    network, intervals = built("raw")
    watched = Watched(monkeypatch)
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    own = torch.arange(64) < 40
    level = torch.full((64,), intervals.owned(1)[0] * 1.5)
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    labels = {"images": images, "label": torch.zeros(64, dtype=torch.long)}
    with torch.no_grad():
        network(1, labels, images, level, eps, before=Cascade(intervals, own))
    (first, z0, s0), (_, z1, s1) = watched.seen
    assert first == 0 and torch.equal(s1, level) and torch.equal(z1[~own], (images + level[0] * eps)[~own])
    low, high = intervals.owned(0)
    assert len(z0) == 40 and low * 0.999 <= float(s0.min()) and float(s0.max()) <= high * 1.001 and len(set(s0)) == 40
    assert float(((z0 - images[:40]).flatten(1).std(1) / s0).mean()) == pytest.approx(1, rel=0.05)
    said = network.denoise(0, {k: v[:40] for k, v in labels.items()}, z0, s0).detach()
    keep = (s1[:40] / s0)[:, None, None, None]
    assert torch.allclose(z1[:40], keep * z0 + (1 - keep) * said, atol=1e-5)


def test_noise_along_a_cascade_is_markov(monkeypatch):
    """Each level has fresh noise beyond the next one's, of which the next one's noise is no part."""
    network, intervals = built("features")
    watched = Watched(monkeypatch)
    images = torch.zeros(200, 1, 8, 8)
    level = torch.full((200,), intervals.owned(2)[1] * 0.5)
    eps = network.task.draw({"images": images}, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        labels = torch.zeros(200, dtype=torch.long)
        network(2, {"images": images, "label": labels}, images, level, eps, before=Cascade(intervals))
    (_, z0, s0), (_, z1, s1), (_, z2, s2) = watched.seen
    assert float(s0[0]) == pytest.approx(intervals.owned(0)[0]) and float(s1[0]) == pytest.approx(intervals.owned(1)[0])
    for (high, s_high), (low, s_low) in (((z0, s0), (z1, s1)), ((z1, s1), (z2, s2))):
        assert float(high.std()) == pytest.approx(float(s_high[0]), rel=0.03)
        fresh = (high - low) / (s_high[0].square() - s_low[0].square()).sqrt()
        assert float(fresh.std()) == pytest.approx(1, rel=0.03)
        assert abs(float((fresh * low / s_low[0]).mean())) < 0.03


def test_injected_z_has_unit_scale():
    """c_in z for images of the scale sigma_data, at all levels; and what is heard of a stream is normed."""
    network, intervals = built("features")
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * network.sigma_data
    for level in (intervals.boundaries[0], 0.5, 5.0, intervals.boundaries[-1]):
        sigma = torch.full((64,), level)
        z = network.task.corrupt(network.model, images, sigma, torch.randn_like(images))
        fed = network.task.passage(
            network.model, 0, {"images": images, "label": torch.zeros(64).long()}, network.corrupted(0, z, sigma)
        )
        assert float(fed.inputs["images"].std()) == pytest.approx(1, rel=0.1)
    hearing = network.conditioning.get_submodule("context.1")
    loud = torch.randn(2, 4, 16)
    assert torch.allclose(hearing(loud), hearing(100 * loud), atol=1e-4)


@torch.no_grad()
def test_evaluation_lets_earlier_blocks_run():
    network, intervals = built("features")
    images = torch.randn(4, 1, 8, 8)
    batch = {"images": images, "label": torch.tensor([1, 2, 3, 4])}, images
    found = Denoising(network, intervals, None, 4, 0).measure([batch])
    assert found == Denoising(network, intervals, None, 4, 0).measure([batch]) and found["loss"] > 0


def test_steps_that_pass_a_block_over_are_refused():
    with pytest.raises(UsageError, match="2 steps leave out block 1"):
        drawn(*built("features"), steps=2)
    assert drawn(*built("raw"), steps=2).isfinite().all()
