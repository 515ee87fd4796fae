"""Blocks of classifiers that hear each other, and the sampler's own z: in every place where a label can enter."""

from functools import cache

import networks
import pytest
import torch
from cascades import Entered, blockwise, same

from dbconvert.diffusion.sampling import levels
from dbconvert.engine.cascade import Cascade, approach, forward_layers
from dbconvert.engine.infer import sample
from dbconvert.engine.listening import Arrival
from dbconvert.graph.account import saved_bytes
from dbconvert.recipe import TrainOptions
from dbconvert.tasks.classification import Classification

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXTS = ["features", "estimate"]
FORMS = [
    ("vit", None, None),
    ("vit", "replace", None),
    ("vit", "append", "pooled"),
    ("vit_mean", "append", "pooled"),
    ("vit_mean", "append", "token"),
    ("encoder_post_seq_first", None, None),
    ("conv", None, None),
    ("whole_sequential", None, None),
]
DRAWN = 3


@cache
def built(form, context):
    name, entry, readout = form
    if name == "whole_sequential":
        torch.manual_seed(0)
        model, inputs = networks.whole_sequential(), {"input": torch.randn(2, 8)}
    else:
        model, inputs = networks.build(name)
    network, intervals = blockwise(model, inputs, Classification, 2, context=context, entry=entry, readout=readout)
    inputs = {name: torch.cat([value, value + 0.1])[:DRAWN] for name, value in inputs.items()}
    return network, intervals, inputs


def labels():
    return torch.tensor([0, 2, 1])


@pytest.mark.parametrize("context", ["raw", *CONTEXTS])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_training_on_policy_meets_what_sampling_meets(form, context):
    """To the bit, at every level of the sampler: the stream that enters the layers, and the conditioning."""
    network, intervals, inputs = built(form, context)
    with Entered(network) as sampled:
        list(sample(network, intervals, inputs))
    assert [block for block, *_ in sampled.seen] == [0, 1, 1]
    eps, own = network.task.draw(inputs), torch.ones(DRAWN, dtype=torch.bool)
    for (block, *met), level in zip(sampled.seen, levels(intervals), strict=True):
        with Entered(network) as trained, torch.no_grad():
            sigma = torch.full((DRAWN,), level)
            network(block, inputs, labels(), sigma, eps, before=Cascade(intervals, own))
        assert trained.seen[-1][0] == block and same(trained.seen[-1][1:], met)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_heard_changes_what_is_said(form, context):
    network, intervals, inputs = built(form, context)
    said = list(sample(network, intervals, inputs))
    hearing = network.conditioning.get_parameter("context.1.linear.weight")
    kept = hearing.detach().clone()
    with torch.no_grad():
        hearing.zero_()
        deaf = list(sample(network, intervals, inputs))
        hearing.copy_(kept)
    assert torch.equal(deaf[0], said[0]) and not torch.allclose(deaf[-1], said[-1], atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_examples_hear_their_own_predecessor(form):
    network, intervals, inputs = built(form, "features")
    alone = [list(sample(network, intervals, {k: v[i : i + 1] for k, v in inputs.items()}))[-1] for i in range(DRAWN)]
    together = list(sample(network, intervals, inputs))[-1]
    assert torch.allclose(torch.cat(alone), together, atol=1e-4 * float(together.abs().max()))


@pytest.mark.parametrize("context", ["raw", "features"])
def test_a_mixed_batch_is_two_batches(context):
    network, intervals, inputs = built(FORMS[0], context)
    sigma, eps = torch.full((DRAWN,), levels(intervals)[1]), network.task.draw(inputs)
    own = torch.tensor([True, False, True])

    def losses(own):
        torch.manual_seed(0)
        with torch.no_grad():
            return network(1, inputs, labels(), sigma, eps, before=Cascade(intervals, own))

    mixed, on, off = losses(own), losses(torch.ones(3).bool()), losses(torch.zeros(3).bool())
    assert torch.allclose(mixed, torch.where(own, on, off), atol=1e-4) and not torch.allclose(on, off, atol=1e-3)


@pytest.mark.parametrize("context", CONTEXTS)
def test_gradients_and_activations_stay_inside_the_block(context):
    network, intervals, inputs = built(FORMS[0], context)
    sigma, eps = torch.full((DRAWN,), 0.3), network.task.draw(inputs)

    def loss(before):
        return network(1, inputs, labels(), sigma, eps, before=before).mean()

    network.train().zero_grad()
    loss(Cascade(intervals)).backward()
    owners = {network.owner(name) for name, p in network.model.named_parameters() if p.grad is not None}
    assert owners == {1, None} and network.conditioning.get_parameter("context.1.linear.weight").grad.any()
    network.zero_grad()
    raw, *_ = built(FORMS[0], "raw")
    raw.train()
    plain = saved_bytes(lambda: raw(1, inputs, labels(), sigma, eps).mean(), raw.parameters())
    kept = saved_bytes(lambda: loss(Cascade(intervals)), network.parameters())
    heard = DRAWN * (17 * networks.WIDTH if context == "features" else networks.WIDTH) * 4
    assert kept <= plain + heard + 200
    network.eval(), raw.eval()


def test_noise_along_a_cascade_is_markov(monkeypatch):
    """Each z has fresh noise beyond the next one's: no mix of two levels is nearer to y than the lower one."""
    network, intervals, inputs = built(FORMS[0], "features")
    seen, plain = [], type(network).denoise
    many = {name: value[:1].expand(400, *value.shape[1:]) for name, value in inputs.items()}
    given = torch.zeros(400, dtype=torch.long)

    def spied(self, block, inputs, z, sigma, *args, **kwargs):
        seen.append((z, sigma))
        return plain(self, block, inputs, z, sigma, *args, **kwargs)

    monkeypatch.setattr(type(network), "denoise", spied)
    with torch.no_grad():
        eps = network.task.draw(many, generator=torch.Generator().manual_seed(3))
        network(1, many, given, torch.full((400,), 0.1), eps, before=Cascade(intervals))
    (high, s_high), (low, s_low) = seen
    y = network.task.clean(network.model, given).detach()
    assert float(s_high[0]) == pytest.approx(intervals.owned(0)[1])
    assert float((high - y).square().mean().sqrt()) == pytest.approx(float(s_high[0]), rel=0.05)
    for share in torch.linspace(-4, 4, 41):
        off = float((low + share * (low - high) - y).square().mean().sqrt())
        assert off > 0.98 * float(s_low[0])


@torch.no_grad()
def test_injected_z_has_unit_scale():
    """c_in z of the truth at all levels; the sampler's own is no louder, and so is what is told of an estimate."""
    network, intervals, inputs = built(FORMS[0], "raw")
    many = {name: value[:1].expand(300, *value.shape[1:]) for name, value in inputs.items()}
    task, given = network.task, torch.arange(300) % 5
    eps = task.draw(many, generator=torch.Generator().manual_seed(0))
    for level in (intervals.boundaries[0], 0.2, 1.0, intervals.boundaries[-1]):
        sigma = torch.full((300,), level)
        z = task.corrupt(network.model, given, sigma, eps)
        entering = task.arriving(network.corrupted(0, z, sigma))
        assert float(entering.square().mean().sqrt()) == pytest.approx(1, rel=0.1)
    met = Arrival(many, torch.zeros_like(z), torch.full((300,), levels(intervals)[1]))
    found = Cascade(intervals, torch.ones(300).bool())(network, 1, met, given)
    entering = task.arriving(network.corrupted(1, found.z, found.sigma))
    assert 0.1 < float(entering.square().mean().sqrt()) < 1
    told = task.told(network.model, task.clean(network.model, given), eps)
    assert float(told.square().mean().sqrt()) == pytest.approx(1, rel=0.25)


@torch.no_grad()
@pytest.mark.parametrize("z", ["noised", "on-policy", "mixed"])
@pytest.mark.parametrize("context", ["raw", "features"])
def test_layers_that_run_forward_only_are_counted(monkeypatch, context, z):
    """What the formula says of the mean over blocks is what runs, example by example."""
    network, intervals, inputs = built(FORMS[0], context)
    many = {name: value[:1].expand(256, *value.shape[1:]) for name, value in inputs.items()}
    given, ran, plain = torch.zeros(256, dtype=torch.long), [], type(network).denoise

    def spied(self, block, inputs, z, *args, **kwargs):
        ran.append(len(self.plan.layers_of(block)) * len(z))
        return plain(self, block, inputs, z, *args, **kwargs)

    monkeypatch.setattr(type(network), "denoise", spied)
    train = TrainOptions(z=z, mixed=0.25)
    torch.manual_seed(0)
    for block in (0, 1):
        sigma, before = approach(network, intervals, block, torch.full((256,), 0.3), train)
        network(block, many, given, sigma, network.task.draw(many), before=before)
        ran.pop()  # the block's own pass
    assert sum(ran) / 256 / 2 == pytest.approx(forward_layers(network.task, network.plan, train), rel=0.15)
