"""Noise `auto` fitted again: to a network's own cross-entropy, in place of the posterior entropy of its table.

p(ln sigma) becomes proportional to d CE / d ln sigma, as `entropy.py` makes it of H(y | z): equal steps of it give
every block as much to resolve, now by what the network can do and knows beside z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dbconvert.diffusion.distributions import NoiseDistribution, Tabulated, interpolate
from dbconvert.diffusion.entropy import DIGITS, OPEN_AT_MAX, OPEN_AT_MIN, significant

LEVELS = 33
"""Levels at which the cross-entropy is measured, evenly in ln sigma, both ends included."""
KEPT = 0.1
"""Share of the mass that stays where it was, so that no level goes untrained where the measured curve is flat."""
IDLE = 0.1
"""An end of the range is idle where the outermost 0.5 % of the cross-entropy's way take more than this share of it."""


def levels_of(distribution: NoiseDistribution) -> Tensor:
    """Where to measure, ascending, [LEVELS] double."""
    return distribution.evenly(torch.linspace(0, 1, LEVELS, dtype=torch.float64))


def rising(values: Tensor) -> Tensor:
    """The non-decreasing values nearest to `values` [n] in squares (isotonic regression): max over starts up to i of
    the min over ends from i on of the mean between."""
    count = len(values)
    index = torch.arange(count)
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    means = (sums[1:][None] - sums[:-1][:, None]) / (index[None] - index[:, None] + 1).clamp(min=1)
    means = means.masked_fill(index[None] < index[:, None], torch.inf)
    least = means.flip(1).cummin(1).values.flip(1)
    return least.masked_fill(index[None] < index[:, None], -torch.inf).amax(0)


def refit(before: NoiseDistribution, entropies: Tensor) -> Tabulated | None:
    """The distribution that a measured cross-entropy asks for.

    Args:
        entropies: at `levels_of(before)`, in nats.

    Returns:
        None where the cross-entropy does not rise with the noise at all. The range stays, but for ends that are idle,
        which move in to where 0.5 % of the way are done.
    """
    levels = levels_of(before)
    way = rising(entropies.double())
    if way[-1] <= way[0]:
        return None
    way = (way - way[0]) / (way[-1] - way[0])
    low, high = ends(levels.log(), way)
    mass = (1 - KEPT) * way + KEPT * before.cdf(levels)
    return Tabulated(
        log_sigma=tuple(round(v, DIGITS) for v in levels.log().tolist()),
        mass=tuple(round(v, DIGITS) for v in mass.tolist()),
        sigma_min=before.sigma_min if low is None else significant(low),
        sigma_max=before.sigma_max if high is None else significant(high),
    )


def ends(log_sigma: Tensor, way: Tensor) -> tuple[float | None, float | None]:
    """Where the range may begin and end; None for an end that is not idle."""
    steep = way + torch.arange(len(way)).double() * 1e-12
    low, high = interpolate(torch.tensor([OPEN_AT_MIN, OPEN_AT_MAX]).double(), steep, log_sigma).tolist()
    first, last = float(log_sigma[0]), float(log_sigma[-1])
    width = (last - first) * IDLE
    return (math.exp(low) if low - first > width else None), (math.exp(high) if last - high > width else None)
