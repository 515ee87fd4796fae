"""A looped core trained on the states that it comes to by itself."""

from functools import cache

import pytest
import torch
from cascades import Entered, same
from loops import Looped, recurrent_network
from networks import tokens

from dbconvert.diffusion.sampling import levels
from dbconvert.engine.cascade import Cascade, approach
from dbconvert.engine.decide import decide_context
from dbconvert.engine.infer import sample
from dbconvert.errors import UsageError
from dbconvert.graph.account import saved_bytes
from dbconvert.recipe import SplitOptions, TrainOptions
from dbconvert.tasks.recurrent import Recurrent

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDS = 4
FORMS = ["concat", "add", "none"]


@cache
def built(form="concat"):
    torch.manual_seed(0)
    return recurrent_network(Looped(form))


def on_policy(network, intervals, level):
    """Losses of a batch at a level for each example, on-policy."""
    ids = tokens()[: len(level)]
    eps = network.task.draw({"ids": ids}, generator=torch.Generator().manual_seed(0))
    cascade = Cascade(intervals, torch.ones(len(level)).bool())
    return network(0, {"ids": ids}, ids, level, eps, before=cascade)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_training_on_policy_meets_what_sampling_meets(form):
    """To the bit, after every number of Euler steps."""
    network, intervals = built(form)
    grid = levels(intervals, ROUNDS)
    with Entered(network) as sampled:
        list(sample(network, intervals, {"ids": tokens()}))
    assert len(sampled.seen) == ROUNDS
    for level, met in zip(grid, sampled.seen, strict=True):
        with Entered(network) as trained:
            on_policy(network, intervals, torch.full((len(tokens()),), level))
        assert same(trained.seen[-1][1:], met[1:])


def watch(network, run):
    """The states that enter the core in all passes of `run`."""
    seen, plain = [], network.call

    def call(block, passage):
        loop = passage.loop
        seen.append(loop.state if loop.state is not None else passage.entry(torch.zeros(1)))
        return plain(block, passage)

    network.call = call
    run()
    del network.call
    return seen


@torch.no_grad()
def test_examples_at_different_numbers_of_steps():
    """Each is where it would be alone, and only those that go on are run again."""
    network, intervals = built()
    grid = levels(intervals, ROUNDS)
    mixed = on_policy(network, intervals, torch.tensor([grid[2], grid[0]]))
    states = watch(network, lambda: on_policy(network, intervals, torch.tensor([grid[2], grid[0]])))
    assert [len(state) for state in states] == [1, 1, 2]
    for i, level in enumerate((grid[2], grid[0])):
        alone = on_policy(network, intervals, torch.full((2,), level))
        assert torch.allclose(mixed[i], alone[i], atol=1e-4)


def test_levels_are_those_of_the_sampler():
    network, intervals = built()
    sigma, before = approach(network, intervals, 0, torch.full((256,), 0.5), TrainOptions(z="mixed", mixed=0.5))
    grid = {float(torch.tensor(level)) for level in levels(intervals, ROUNDS)}
    assert int(before.own.sum()) == 128 and set(sigma[before.own].tolist()) == grid
    assert set(sigma[~before.own].tolist()) == {0.5}


def test_steps_keep_no_activations_and_give_no_gradient():
    network, intervals = built()
    last = torch.full((2,), levels(intervals, ROUNDS)[-1])
    ids = tokens()[:2]

    def noised():
        return network(0, {"ids": ids}, ids, last, network.task.draw({"ids": ids})).mean()

    own = saved_bytes(lambda: on_policy(network, intervals, last).mean(), network.parameters())
    assert own == pytest.approx(saved_bytes(noised, network.parameters()), abs=100)


@torch.no_grad()
def test_the_state_enters_at_the_scale_of_the_network_s_own():
    network, intervals = built()
    ids = tokens().repeat(8, 1)
    for level in (intervals.boundaries[0], 0.5, intervals.boundaries[-1]):
        sigma = torch.full((len(ids),), level)
        eps = network.task.draw({"ids": ids}, generator=torch.Generator().manual_seed(0))
        (state,) = watch(network, lambda: network(0, {"ids": ids}, ids, sigma, eps))  # noqa: B023
        assert float(state.square().mean().sqrt()) == pytest.approx(network.task.loop.scale, rel=0.15)
    for state in watch(network, lambda: list(sample(network, intervals, {"ids": ids}))):
        assert float(state.square().mean().sqrt()) < 1.1 * network.task.loop.scale


def test_there_is_no_predecessor_to_hear():
    network, _ = built()
    with pytest.raises(UsageError, match=r"there is only one\n.*its predecessor is itself"):
        decide_context(SplitOptions(context="estimate"), Recurrent, 1, network.plan.anatomy)
