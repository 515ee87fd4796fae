"""Blocks that hear each other, and the sampler's own z: causality, no leaks, and the same inputs as in sampling."""

import copy
from functools import cache

import networks
import pytest
import torch
from language import causal_network

from dbconvert.diffusion.sampling import levels
from dbconvert.engine.cascade import Cascade, approach
from dbconvert.engine.generate import Decoding, Writer, can_cache
from dbconvert.engine.infer import sample
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.errors import UsageError
from dbconvert.graph.account import saved_bytes
from dbconvert.recipe import TrainOptions
from tests.acceptance.table import CONVERTED

CONTEXTS = ["features", "estimate"]
CACHED = ["gpt", "hf_llama", "hf_mistral"]
FAMILIES = [*CACHED, "hf_gpt_neox_sequential", "hf_gemma2"]
LENGTH, BLOCKS = 7, 3


def start(length=LENGTH, examples=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, networks.VOCABULARY, (examples, length), generator=generator)


@cache
def built(name, context):
    return causal_network(CONVERTED[name], blocks=BLOCKS, context=context)


def writer(name="gpt", context="features", **decoding):
    network, intervals = built(name, context)
    network.zero_grad()
    network.eval()
    return Writer(network, intervals, Decoding(**decoding), torch.Generator().manual_seed(0))


def given(network, tokens):
    return {network.plan.anatomy.embedding.argument: tokens}


def noises(network, examples=1):
    """A z and a level for every block, as different as can be."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(BLOCKS, examples, LENGTH, network.task.target.width, generator=generator)
    return list(zip(z, (2.0, 0.7, 0.3), strict=True))


@torch.no_grad()
def together(network, tokens, cascade):
    """Scores of every block, each hearing the one before, in one pass on both halves a block."""
    heard, found = None, []
    for block, (z, sigma) in enumerate(cascade):
        level = torch.full((len(tokens),), sigma)
        found.append(network.denoise(block, given(network, tokens), z, level, heard=heard, tells=True))
        heard = network.delivered(network.task.denoised(network.model, found[-1]), z)
    return found


@torch.no_grad()
def alone(made, tokens, cascade, i):
    """The same at position i, each block in an ordinary causal pass on the clean tokens before it and the noisy one."""
    heard, found = None, []
    for block, (z, sigma) in enumerate(cascade):
        here = z[:, i : i + 1]
        found.append(made.evaluate(block, tokens[:, :i], here, sigma, None, heard))
        heard = made.network.delivered(made.task.denoised(made.network.model, found[-1]), here)
    return found


class Entered:
    """Records the stream that enters the layers of every block, while it is open."""

    def __init__(self, network):
        self.network, self.seen = network, []

    def __enter__(self):
        network, plain = self.network, self.network.call

        def call(block, inputs):
            entry = network.run.entry or (lambda stream: stream)

            def enter(stream):
                self.seen.append((block, entry(stream).detach().clone()))
                return self.seen[-1][1]

            network.run.entry = enter
            return plain(block, inputs)

        network.call = call
        return self

    def __exit__(self, *_):
        del self.network.call


# -- causality --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_noisy_token_hears_what_its_clean_prefix_alone_would_tell(name, context):
    made, tokens = writer(name, context), start()
    cascade = noises(made.network)
    whole = together(made.network, tokens, cascade)
    raw = together(writer(name, "raw").network, tokens, cascade)
    assert not torch.allclose(whole[-1], raw[-1], atol=1e-2)
    for i in range(1, LENGTH):
        for one, every in zip(alone(made, tokens, cascade, i), whole, strict=True):
            assert torch.allclose(every[:, i], one[:, 0], atol=1e-4 * max(1.0, float(one.abs().max())))


@pytest.mark.parametrize("context", CONTEXTS)
def test_later_tokens_and_noises_change_nothing(context):
    network, tokens = writer("gpt", context).network, start()
    cascade = noises(network)
    before = together(network, tokens, cascade)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % networks.VOCABULARY
    after = together(network, changed, cascade)
    assert torch.allclose(after[-1][:, :4], before[-1][:, :4], atol=1e-5)
    assert not torch.allclose(after[-1][:, 4], before[-1][:, 4], atol=1e-3)
    moved = [(z.clone(), sigma) for z, sigma in cascade]
    for z, _ in moved:
        z[:, 3] += 1
    after = together(network, tokens, moved)
    others = [i for i in range(LENGTH) if i != 3]
    assert torch.allclose(after[-1][:, others], before[-1][:, others], atol=1e-5)
    assert not torch.allclose(after[-1][:, 3], before[-1][:, 3], atol=1e-3)


def test_clean_positions_hear_no_estimate():
    """Their keys and values are those of the raw form."""
    streams = []
    for context in ("raw", "estimate"):
        network = writer("gpt", context).network
        with Entered(network) as entered:
            together(network, start(), noises(network))
        streams.append(entered.seen[-1][1])
    raw, told = streams
    assert torch.equal(raw[:, :LENGTH], told[:, :LENGTH]) and not torch.allclose(raw, told, atol=1e-2)


# -- generation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("steps", [None, 9])
@pytest.mark.parametrize("name", CACHED)
def test_cached_generation_is_generation(name, steps, context):
    made = writer(name, context, steps=steps)
    assert can_cache(made, start(4), lambda _: None)
    plain = list(made.tokens(start(4), 3, cache=False))
    assert list(made.tokens(start(4), 3, cache=True)) == plain
    prefixes = {b: made.task.prefix() for b in range(BLOCKS)}
    with torch.no_grad():
        for length in (3, 4, 5):
            cached = made.next_scores(start(5)[:, :length], prefixes)
        uncached = made.next_scores(start(5), {})
    assert torch.allclose(cached, uncached, atol=1e-3 * max(1.0, float(uncached.abs().max())))


@pytest.mark.parametrize("context", ["raw", *CONTEXTS])
def test_the_generator_says_what_the_evaluation_s_sampler_says(context):
    made, tokens = writer("gpt", context), start()
    scores = list(sample(made.network, made.intervals, given(made.network, tokens)))[-1]
    with torch.no_grad():
        for i in (1, 4, 6):
            assert torch.allclose(made.next_scores(tokens[:, :i], {}), scores[0, i], atol=1e-3)


def test_steps_that_pass_a_block_over_are_refused():
    made = writer("gpt", "features", steps=2)
    for run in (
        lambda: made.next_scores(start(), {}),
        lambda: list(sample(made.network, made.intervals, given(made.network, start()), steps=2)),
    ):
        with torch.no_grad(), pytest.raises(UsageError, match="2 steps leave out block 1"):
            run()
    raw = writer("gpt", "raw", steps=2)
    assert len(list(sample(raw.network, raw.intervals, given(raw.network, start()), steps=2))) == 2


# -- training gives what sampling gives -------------------------------------------------------------------------


def layer_of(network, block):
    anatomy = network.plan.anatomy
    return network.model.get_submodule(anatomy.layers[network.plan.layers_of(block).start].path)


@pytest.mark.parametrize("context", ["raw", *CONTEXTS])
def test_training_on_policy_meets_what_sampling_meets(context):
    """To the bit, at every level of the sampler; and the generator's noisy token meets the same."""
    made = writer("gpt", context)
    network, tokens = made.network, start(examples=2)
    inputs, grid = given(network, tokens), levels(made.intervals)
    with Entered(network) as sampled:
        list(sample(network, made.intervals, inputs))
    assert [b for b, _ in sampled.seen] == [0, 1, 2, 2]
    eps, own = network.task.draw(inputs), torch.ones(2, dtype=torch.bool)
    for i, (block, met) in enumerate(sampled.seen):
        with Entered(network) as trained:
            network(block, inputs, tokens, torch.full((2,), grid[i]), eps, before=Cascade(made.intervals, own))
        assert trained.seen[-1][0] == block and torch.equal(trained.seen[-1][1], met)
    with Entered(network) as written, torch.no_grad():
        made.next_scores(tokens[:1, :4], {})
    for (block, met), (same, here) in zip(sampled.seen, written.seen, strict=True):
        assert block == same and torch.allclose(here[0, -1], met[0, LENGTH + 4], atol=1e-5)
        assert torch.allclose(here[0, :4], met[0, :4], atol=1e-5)


def test_levels_of_examples_on_policy():
    made = writer("gpt", "raw")
    grid, drawn = levels(made.intervals), torch.full((64,), 0.5)

    def told(block, **train):
        return approach(made.network, made.intervals, block, drawn, TrainOptions(**train))

    sigma, before = told(1, z="on-policy")
    assert before.own.all() and torch.equal(sigma, torch.full((64,), grid[1]))
    sigma, before = told(2, z="on-policy")
    assert set(sigma.tolist()) == {float(torch.tensor(level)) for level in grid[2:]}
    sigma, before = told(1, z="mixed", mixed=0.25)
    assert int(before.own.sum()) == 16 and torch.equal(sigma[~before.own], drawn[:48])
    of_positions = drawn[:, None].expand(-1, LENGTH)
    sigma, _ = approach(made.network, made.intervals, 0, of_positions, TrainOptions(z="mixed"))
    assert torch.equal(sigma[:32], torch.full((32, LENGTH), grid[0])) and torch.equal(sigma[32:], of_positions[32:])


def test_small_parts_of_a_batch_get_their_share():
    made = writer("gpt", "raw")
    torch.manual_seed(0)
    alone = [approach(made.network, made.intervals, 0, torch.ones(1), TrainOptions(z="mixed"))[1] for _ in range(200)]
    assert 70 < sum(bool(before.own.all()) for before in alone) < 130


@pytest.mark.parametrize("context", ["raw", "features"])
def test_a_mixed_batch_is_two_batches(context):
    """On-policy examples are those of an on-policy batch, and the others those of a noised one."""
    made = writer("gpt", context)
    network, tokens = made.network, start(examples=4)
    eps, sigma = network.task.draw(given(network, tokens)), torch.full((4,), levels(made.intervals)[1])
    own = torch.tensor([True, False, True, False])

    def losses(own):
        torch.manual_seed(0)
        with torch.no_grad():
            cascade = Cascade(made.intervals, own)
            return network(1, given(network, tokens), tokens, sigma, eps, before=cascade)

    mixed, on, off = losses(own), losses(torch.ones(4).bool()), losses(torch.zeros(4).bool())
    assert torch.allclose(mixed, torch.where(own[:, None], on, off), atol=1e-4)
    assert not torch.allclose(on, off, atol=1e-2)


# -- noise ------------------------------------------------------------------------------------------------------


def noise_levels(made, monkeypatch, sigma, examples=400):
    """(block, z, sigma) of all blocks for the third one's batch; y is the same everywhere but for its token."""
    seen, network = [], made.network
    denoise = BlockwiseNetwork.denoise

    def spied(self, block, inputs, z, sigma, *args, **kwargs):
        seen.append((block, z, sigma))
        return denoise(self, block, inputs, z, sigma, *args, **kwargs)

    tokens = start(examples=examples)
    eps = network.task.draw(given(network, tokens), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(BlockwiseNetwork, "denoise", spied)
    with torch.no_grad():
        network(2, given(network, tokens), tokens, sigma.expand(examples), eps, before=Cascade(made.intervals))
    monkeypatch.undo()
    return seen, network.task.clean(network.model, tokens).detach()


def off_by(found, y):
    return float((found - y).square().mean().sqrt())


def test_no_two_levels_give_the_target_away(monkeypatch):
    """With one eps for two levels a weighted difference is y itself; here none is nearer than the lower level's z."""
    made = writer("gpt", "features")
    seen, y = noise_levels(made, monkeypatch, torch.tensor([0.3]))
    (_, z0, s0), (_, z1, s1), (_, z2, s2) = seen
    assert [block for block, *_ in seen] == [0, 1, 2]
    top = [made.intervals.owned(b)[1] for b in (0, 1)]
    assert float(s0[0]) == pytest.approx(top[0]) and float(s1[0]) == pytest.approx(top[1])
    for (high, s_high), (low, s_low) in (((z1, s1), (z2, s2)), ((z0, s0), (z1, s1)), ((z0, s0), (z2, s2))):
        assert off_by(high, y) == pytest.approx(float(s_high[0]), rel=0.02)
        for share in torch.linspace(-4, 4, 81):
            assert off_by(low + share * (low - high), y) > 0.98 * float(s_low[0])
        shared = y + (low - y) * float(s_high[0] / s_low[0])
        weight = float(s_low[0] / (s_high[0] - s_low[0]))
        assert off_by(low + weight * (low - shared), y) < 1e-5  # what the test would see of a shared eps
    columns = torch.stack([z.flatten() for _, z, _ in seen], -1).double()
    best = columns @ torch.linalg.lstsq(columns, y.flatten().double()[:, None]).solution
    only = columns[:, 2:] @ torch.linalg.lstsq(columns[:, 2:], y.flatten().double()[:, None]).solution
    assert off_by(best[:, 0], y.flatten()) == pytest.approx(off_by(only[:, 0], y.flatten()), rel=1e-3)


def test_a_level_above_its_predecessor_s_stays_markov(monkeypatch):
    made = writer("gpt", "features")
    high = torch.tensor([1.1 * made.intervals.owned(1)[1]])
    seen, _ = noise_levels(made, monkeypatch, high, examples=2)
    (_, z1, s1), (_, z2, s2) = seen[1:]
    assert torch.equal(s1, s2) and torch.equal(z1, z2)


# -- what is trained --------------------------------------------------------------------------------------------


def loss(network, intervals, block, own=None):
    tokens = start(examples=2)
    eps = network.task.draw(given(network, tokens), generator=torch.Generator().manual_seed(0))
    cascade = Cascade(intervals, own) if own is not None or network.plan.context != "raw" else None
    return network(block, given(network, tokens), tokens, torch.full((2,), 0.3), eps, before=cascade).mean()


@pytest.mark.parametrize("context", CONTEXTS)
def test_gradients_stay_inside_the_block(context):
    made = writer("gpt", context)
    network = made.network.train()
    loss(network, made.intervals, 2).backward()
    owners = {network.owner(name) for name, p in network.model.named_parameters() if p.grad is not None}
    assert owners == {2, None}
    hearing = network.conditioning.get_parameter("context.2.linear.weight")
    assert hearing.grad.any() and "dbconvert.context.2.linear.weight" in network.block_tensors(2)


def test_only_the_block_s_own_activations_are_kept():
    kept = {}
    for context, own in (("raw", None), ("raw", torch.ones(2).bool()), ("features", None)):
        made = writer("gpt", context)
        network = made.network.train()
        key = (context, own is not None)
        kept[key] = saved_bytes(lambda n=network, i=made.intervals, o=own: loss(n, i, 2, own=o), network.parameters())
    plain = kept["raw", False]
    assert kept["raw", True] == pytest.approx(plain, abs=100)
    heard = 2 * 2 * LENGTH * networks.WIDTH * 4  # [N, 2S, d], what the linear map multiplies
    assert kept["features", False] == pytest.approx(plain + heard, abs=100)


def test_earlier_blocks_run_in_eval_mode_and_the_mode_comes_back():
    made = writer("gpt", "features")
    network = made.network.train()
    modes = []
    hooks = [
        layer_of(network, b).register_forward_pre_hook(lambda m, _, b=b: modes.append((b, m.training)))
        for b in range(BLOCKS)
    ]
    loss(network, made.intervals, 2)
    for hook in hooks:
        hook.remove()
    assert list(dict.fromkeys(modes)) == [(0, False), (1, False), (2, True)]
    assert all(module.training for module in network.modules())


def test_weights_cast_without_gradient_are_not_used_again():
    """Autocast keeps its copies of shared weights: made by an earlier block, they would swallow the gradient."""
    made = writer("gpt", "estimate")
    network = made.network.train()
    head = network.model.get_submodule(network.plan.anatomy.head.module).weight
    with torch.autocast("cpu", torch.bfloat16):
        loss(network, made.intervals, 1).backward()
    assert head.grad is not None and head.grad.any()


# -- the paper's form -------------------------------------------------------------------------------------------


def test_the_default_draws_nothing_and_adds_nothing():
    made = writer("gpt", "raw")
    state = torch.get_rng_state()
    sigma = torch.ones(3)
    found, before = approach(made.network, made.intervals, 2, sigma, TrainOptions())
    assert found is sigma and before is None and torch.equal(torch.get_rng_state(), state)
    assert not any("context" in name for name in made.network.tensors())


def test_a_block_that_has_not_learnt_to_listen_is_a_raw_one():
    raw, told = (copy.deepcopy(writer("gpt", context).network) for context in ("raw", "features"))
    for name, tensor in raw.tensors().items():
        assert torch.equal(tensor, told.tensors()[name])
    for block in (1, 2):
        told.conditioning.get_parameter(f"context.{block}.linear.weight").data.zero_()
    cascade = noises(raw)
    for one, other in zip(together(raw, start(), cascade), together(told, start(), cascade), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
