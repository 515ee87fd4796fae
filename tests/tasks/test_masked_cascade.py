"""Blocks of hidden tokens that hear each other: nothing leaks, and what is heard is what the sampler delivers."""

import networks
import pytest
import torch
from tasks.test_masked_lm import NAMES, converted, given

from dbconvert.engine.cascade import Cascade, approach
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.unmask import unmask
from dbconvert.errors import UsageError
from dbconvert.recipe import TrainOptions

CONTEXTS = ["features", "estimate"]
BLOCKS = 3


def network_of(name="gpt", context="features", **more):
    network = converted(name, blocks=BLOCKS, context=context, **more)
    return network, network.plan.preview.intervals()


class Watched:
    """Records what reaches every block, while it is open."""

    def __init__(self, monkeypatch):
        self.seen = []
        plain = BlockwiseNetwork.denoise

        def spied(network, block, inputs, z, sigma, hold=None, heard=None, *, tells=False):
            self.seen.append((block, inputs, z, sigma, heard))
            return plain(network, block, inputs, z, sigma, hold, heard, tells=tells)

        monkeypatch.setattr(BlockwiseNetwork, "denoise", spied)


@torch.no_grad()
def losses(network, intervals, tokens, t=0.2, block=2, own=None, seed=0):
    eps = network.task.draw(given(network, tokens), generator=torch.Generator().manual_seed(seed))
    cascade = Cascade(intervals, own, torch.Generator().manual_seed(seed + 1))
    level = torch.full((len(tokens),), t)
    return network(block, given(network, tokens), tokens, level, eps, before=cascade), eps < t


def text(examples, length=networks.LENGTH):
    return torch.randint(0, networks.VOCABULARY, (examples, length), generator=torch.Generator().manual_seed(3))


# -- the truth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_earlier_blocks_see_less_and_run_when_they_hand_over(monkeypatch, schedule):
    network, intervals = network_of(schedule=schedule)
    watched = Watched(monkeypatch)
    losses(network, intervals, text(400))
    (_, inputs, z0, t0, none), (_, _, z1, t1, heard), (_, _, z2, t2, _) = watched.seen
    assert [block for block, *_ in watched.seen] == [0, 1, 2] and none is None and heard is not None
    assert float(t0[0]) == pytest.approx(intervals.boundaries[2])
    assert float(t1[0]) == pytest.approx(intervals.boundaries[1]) and float(t2[0]) == pytest.approx(0.2)
    assert (z0 | z1).equal(z0) and (z1 | z2).equal(z1)
    for hidden, t in ((z0, t0), (z1, t1), (z2, t2)):
        expected = float(network.task.masking.masked(t[:1]))
        assert float(hidden.float().mean()) == pytest.approx(expected, abs=0.02)
    assert torch.equal(inputs["ids"], text(400))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_hidden_tokens_leave_no_trace_in_what_is_heard(name, context):
    """What a block says of the hidden tokens depends on the visible ones alone: else its bound would be none."""
    network, intervals = network_of(name, context)
    tokens = text(2)
    one, hidden = losses(network, intervals, tokens, t=0.6, block=1)
    other = torch.where(hidden, (tokens + 1) % networks.VOCABULARY, tokens)
    heads = []

    def keep(self, block, features, plain=BlockwiseNetwork.read):
        heads.append(features)
        return plain(self, block, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockwiseNetwork, "read", keep)
        for labels in (tokens, other):
            losses(network, intervals, labels, t=0.6, block=1)
    assert hidden.any() and torch.equal(heads[len(heads) // 2 - 1], heads[-1]) and one.any()


def test_what_is_heard_of_the_estimate_is_of_hidden_tokens(monkeypatch):
    network, intervals = network_of(context="estimate")
    watched = Watched(monkeypatch)
    losses(network, intervals, text(4))
    (_, _, z0, *_), (_, _, _, _, heard), _ = watched.seen
    assert torch.equal(heard.abs().sum(-1) > 0, z0)


# -- the sampler ------------------------------------------------------------------------------------------------


def test_the_last_evaluation_of_a_block_is_what_the_next_one_hears(monkeypatch):
    network, intervals = network_of()
    delivered, plain = [], BlockwiseNetwork.delivered

    def spied(self, expected, z):
        delivered.append(plain(self, expected, z))
        return delivered[-1]

    monkeypatch.setattr(BlockwiseNetwork, "delivered", spied)
    watched = Watched(monkeypatch)
    tokens = torch.zeros(1, networks.LENGTH, dtype=torch.long)
    unmask(network, intervals, tokens, tokens == 0, steps=9, generator=torch.Generator().manual_seed(0))
    blocks = [block for block, *_ in watched.seen]
    assert blocks == sorted(blocks) and set(blocks) == {0, 1, 2} and len(blocks) == 9
    for block, *_, heard in watched.seen:
        last = max((i for i, b in enumerate(blocks) if b == block - 1), default=None)
        assert heard is None if last is None else heard is delivered[last]


@pytest.mark.parametrize("context", CONTEXTS)
def test_training_at_the_sampler_s_state_hears_what_sampling_hears(monkeypatch, context):
    """To 1e-6: what was hidden for the predecessor is taken from the sampler, and so is its time."""
    network, intervals = network_of(context=context)
    watched = Watched(monkeypatch)
    tokens = torch.zeros(1, networks.LENGTH, dtype=torch.long)
    unmask(network, intervals, tokens, tokens == 0, steps=9, generator=torch.Generator().manual_seed(0))
    sampled = list(watched.seen)
    ends = {block: (z, t) for block, _, z, t, _ in sampled}
    _, inputs, z, t, heard = next(each for each in sampled if each[0] == 2)
    task = type(network.task)
    monkeypatch.setattr(task, "handover", lambda self, _, k: float(ends[k][1]))
    monkeypatch.setattr(task, "noisier", lambda self, z, level, higher, draw, labels: next(chain))
    chain = iter([ends[1][0], ends[0][0]])
    monkeypatch.setattr(task, "corrupt", lambda *_: z)
    watched.seen.clear()
    with torch.no_grad():
        # The earlier blocks see the tokens that were shown by then: those that are hidden for them are not looked at.
        network(2, inputs, inputs["ids"], t, torch.zeros(1), before=Cascade(intervals))
    assert torch.allclose(watched.seen[-1][-1], heard, atol=1e-6)


def test_steps_that_pass_a_block_over_are_refused():
    network, intervals = network_of()
    tokens = torch.zeros(1, networks.LENGTH, dtype=torch.long)
    with pytest.raises(UsageError, match="2 steps leave out block 2"):
        unmask(network, intervals, tokens, tokens == 0, steps=2, generator=torch.Generator())


# -- on-policy --------------------------------------------------------------------------------------------------


def test_on_policy_examples_see_tokens_that_the_block_before_drew(monkeypatch):
    """And no others: what it saw is the truth, and what is hidden, with its labels and its losses, stays."""
    network, intervals = network_of(context="raw")
    head = network.model.head
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    head.bias = torch.nn.Parameter(torch.full((networks.VOCABULARY,), -50.0))
    head.bias.data[7] = 0.0
    tokens = text(200)
    own = torch.arange(200) < 120
    watched = Watched(monkeypatch)
    found, hidden = losses(network, intervals, tokens, own=own)
    (first, given_to, z1, t1, _), (_, reaching, z2, _, _) = watched.seen
    assert first == 1 and torch.equal(given_to["ids"], tokens[own])
    low, high = intervals.owned(1)
    assert float(t1.min()) < low + 0.1 * (high - low) and float(t1.max()) > high - 0.1 * (high - low)
    assert low <= float(t1.min()) and float(t1.max()) <= high
    shown = z1 & ~z2[own]
    assert torch.equal(reaching["ids"][own][shown], torch.full((int(shown.sum()),), 7))
    seen = ~z1
    assert torch.equal(reaching["ids"][own][seen], tokens[own][seen])
    assert torch.equal(reaching["ids"][~own], tokens[~own]) and torch.equal(z2, hidden)
    assert torch.equal(found > 0, hidden & (tokens != 7))


def test_the_first_block_s_text_is_the_truth(monkeypatch):
    network, intervals = network_of(context="raw")
    watched = Watched(monkeypatch)
    tokens = text(4)
    losses(network, intervals, tokens, t=0.9, block=0, own=torch.ones(4).bool())
    assert len(watched.seen) == 1 and torch.equal(watched.seen[0][1]["ids"], tokens)


def test_times_stay_as_they_are_drawn():
    network, intervals = network_of(context="raw")
    t = torch.rand(8)
    found, before = approach(network, intervals, 1, t, TrainOptions(z="mixed"))
    assert torch.equal(found, t) and before.own.tolist() == [True] * 4 + [False] * 4


def test_features_come_from_the_pass_that_drew(monkeypatch):
    network, intervals = network_of()
    watched = Watched(monkeypatch)
    losses(network, intervals, text(6), own=torch.ones(6).bool())
    (_, _, z0, t0, _), (_, _, z1, t1, _), (_, _, z2, _, _) = watched.seen
    assert (t0 >= t1).all() and len(set(t1.tolist())) == 6
    assert (z0 | z1).equal(z0) and (z1 | z2).equal(z1)
