"""Masking schedules: what must hold of alpha, its weight, its intervals and its draws."""

import math
from itertools import pairwise

import pytest
import torch

from dbconvert.diffusion.intervals import Intervals, boundaries, stratified
from dbconvert.diffusion.masking import LEAST, Masking
from dbconvert.diffusion.sampling import levels, sigma_grid
from dbconvert.errors import UsageError

SCHEDULES = [Masking(), Masking("cosine"), Masking("polynomial", 2.0), Masking("polynomial", 0.5)]
GOLDEN = {
    # schedule: alpha(1/4), weight(1/4), the times between three blocks
    Masking(): (0.75, 4.0, (1 / 3, 2 / 3)),
    Masking("cosine"): (1 - math.cos(3 * math.pi / 8), math.pi / 2 / math.tan(math.pi / 8), (0.216347, 0.464559)),
    Masking("polynomial", 2.0): (15 / 16, 8.0, (3**-0.5, (2 / 3) ** 0.5)),
}


@pytest.fixture(params=SCHEDULES, ids=lambda m: f"{m.schedule}-{m.power}")
def masking(request):
    return request.param


def intervals_of(masking, blocks, **options):
    return Intervals(masking, tuple(boundaries(masking, blocks)), **options)


@pytest.mark.parametrize("masking", GOLDEN, ids=lambda m: m.schedule)
def test_golden(masking):
    alpha, weight, inner = GOLDEN[masking]
    quarter = torch.tensor(0.25)
    assert float(masking.alpha(quarter)) == pytest.approx(alpha, rel=1e-12)
    assert float(masking.weight(quarter)) == pytest.approx(weight, rel=1e-12)
    assert boundaries(masking, 3) == pytest.approx([masking.sigma_min, *inner, 1], abs=1e-6)


def test_alpha_falls_from_one_to_zero_and_time_is_its_inverse(masking):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = masking.alpha(t)
    assert float(alpha[0]) == 1 and float(alpha[-1]) == pytest.approx(0, abs=1e-12)
    assert bool((alpha.diff() < 0).all())
    assert torch.allclose(masking.time(alpha), t, atol=1e-7)


def test_the_weight_is_the_slope_over_the_masked_share(masking):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64).requires_grad_()
    slope = torch.autograd.grad(masking.alpha(t).sum(), t)[0]
    assert torch.allclose(masking.weight(t), -slope / (1 - masking.alpha(t)), rtol=1e-9)


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_blocks_take_equal_decrements_of_alpha(masking, blocks):
    intervals = intervals_of(masking, blocks)
    alpha = masking.alpha(torch.tensor(intervals.boundaries[1:], dtype=torch.float64))
    assert alpha.tolist() == pytest.approx([1 - b / blocks for b in range(1, blocks + 1)], abs=1e-12)
    assert [intervals.share(b) for b in range(blocks)] == pytest.approx([1 / blocks] * blocks)
    assert intervals.owned(0)[1] == 1.0


def test_ties_go_to_the_block_of_earlier_times():
    intervals = intervals_of(Masking(), 3)
    assert [intervals.block_of(t) for t in (1.0, 0.7, 2 / 3, 1 / 3, 1e-9)] == [0, 0, 1, 2, 2]


def test_overlap_is_a_share_of_the_width_in_time():
    intervals = intervals_of(Masking(), 3, overlap=0.1)
    assert intervals.training(1) == pytest.approx((0.3, 0.7))
    assert intervals.training(0) == pytest.approx((2 / 3 - 1 / 30, 1))


def test_draws_are_even_in_time_and_stay_in_the_training_interval(masking):
    intervals = intervals_of(masking, 3)
    low, high = intervals.training(1)
    drawn = intervals.draw(1, stratified(1000, torch.Generator().manual_seed(0))).sort().values
    even = low + (torch.arange(1000) + 0.5) / 1000 * (high - low)
    assert torch.allclose(drawn, even.float(), atol=(high - low) / 1000)


def test_low_variance_draws_estimate_the_bound_better():
    """A function of t, summed over few draws: one in each of equal cells against independent ones."""
    intervals = intervals_of(Masking(), 1)
    generator = torch.Generator().manual_seed(0)

    def spread(uniform):
        return torch.stack([intervals.draw(0, uniform()).square().mean() for _ in range(200)]).std()

    independent = spread(lambda: torch.rand(16, generator=generator, dtype=torch.float64))
    assert spread(lambda: stratified(16, generator)) < independent / 5


def test_the_weighted_loss_over_even_times_is_schedule_free(masking):
    """With a loss that depends on the masked share q alone, the bound is the integral of loss(q) / q over q."""
    t = masking.evenly((torch.arange(200_000) + 0.5) / 200_000)
    q = masking.masked(t)
    bound = (masking.weight(t) * q * (1 + q)).mean() * (1 - masking.sigma_min)
    assert float(bound) == pytest.approx(1.5 - LEAST - LEAST**2 / 2, rel=1e-3)


def test_grids_are_even_in_time_and_reach_both_ends(masking):
    grid = torch.tensor(sigma_grid(masking, 9), dtype=torch.float64)
    assert grid[0] == 1 and grid[-1] == masking.sigma_min
    assert torch.allclose(grid.diff(), grid.diff()[:1].expand(8))
    assert levels(intervals_of(masking, 2))[0] == 1


def test_revealing_step_by_step_reveals_as_many_as_at_once(masking):
    times = [1.0, 0.8, 0.5, 0.1]
    hidden = math.prod(1 - masking.revealed(t, s) for t, s in pairwise(times))
    assert hidden == pytest.approx(float(masking.masked(torch.tensor(0.1, dtype=torch.float64))))
    assert masking.revealed(0.3, 0.0) == 1


@pytest.mark.parametrize(("schedule", "power"), [("linear", 2.0), ("polynomial", None), ("polynomial", -1.0)])
def test_schedules_that_make_no_sense(schedule, power):
    with pytest.raises(UsageError, match="power"):
        Masking(schedule, power)
