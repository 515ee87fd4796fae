"""Noise distributions over sigma, truncated to [sigma_min, sigma_max].

Intervals, training draws and sampling grids use a distribution only through the methods of `NoiseDistribution`, so
that the log-normal of EDM, an entropy-fitted table and a masking schedule are one mechanism. All arithmetic is float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dbconvert.errors import UsageError

SQRT2 = 2**0.5
Numbers = NDArray[np.float64]


class NoiseDistribution(ABC):
    """A distribution of sigma on [sigma_min, sigma_max]."""

    sigma_min: float
    sigma_max: float
    logarithmic: ClassVar[bool] = True
    """Whether widths of intervals are measured in ln sigma."""

    @abstractmethod
    def cdf(self, sigma: Tensor) -> Tensor:
        """Probability of a level up to sigma: 0 at sigma_min, 1 at sigma_max, float64, any shape."""

    @abstractmethod
    def icdf(self, q: Tensor) -> Tensor:
        """The level below which a share q of the mass lies; inverse of `cdf`, float64, any shape."""

    def between(self, low: float, high: float, uniform: Tensor) -> Tensor:
        """Training levels of an interval from numbers in [0, 1): the distribution truncated to it."""
        if (low, high) not in self._shares:
            start, end = self.cdf(torch.tensor([low, high], dtype=torch.float64)).tolist()
            self._shares[low, high] = start, end
        start, end = self._shares[low, high]
        return self.icdf(start + uniform.double() * (end - start))

    @cached_property
    def _shares(self) -> dict[tuple[float, float], tuple[float, float]]:
        """Probabilities of levels up to the ends of intervals: the same ones in every update."""
        return {}

    def widened(self, low: float, high: float, share: float) -> tuple[float, float]:
        """An interval with both ends moved outwards by a share of its width, in ln sigma."""
        reach = (high / low) ** share
        return low / reach, high * reach

    def evenly(self, shares: Tensor) -> Tensor:
        """Levels at shares of the way up, in ln sigma."""
        low, high = self.sigma_min, self.sigma_max
        return (math.log(low) + shares * math.log(high / low)).exp()

    def spaced(self, shares: Tensor) -> Tensor:
        """Sampling levels at shares of the way up, in mass."""
        return self.icdf(shares)

    def density(self, log_sigma: Tensor, step: float = 1e-3) -> Tensor:
        """Density over ln sigma by central differences (for pictures)."""
        upper, lower = (log_sigma + step).exp(), (log_sigma - step).exp()
        return (self.cdf(upper) - self.cdf(lower)) / (2 * step)


def check_range(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise UsageError(
            f"the noise range [{sigma_min}, {sigma_max}] is empty or not positive",
            hint="choose 0 < sigma_min < sigma_max",
        )


@dataclass(frozen=True)
class LogNormal(NoiseDistribution):
    """ln sigma ~ N(p_mean, p_std^2), truncated (EDM, section 5; the paper's p_noise)."""

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)
        if self.p_std <= 0:
            raise UsageError(f"p_std = {self.p_std} must be positive")

    def _normal_cdf(self, sigma: Tensor) -> Tensor:
        standard = (sigma.double().log() - self.p_mean) / self.p_std
        return 0.5 * torch.erfc(-standard / SQRT2)

    @cached_property
    def _ends(self) -> tuple[float, float]:
        q_min, q_max = self._normal_cdf(torch.tensor([self.sigma_min, self.sigma_max]).double()).tolist()
        return q_min, q_max

    def cdf(self, sigma: Tensor) -> Tensor:
        q_min, q_max = self._ends
        return ((self._normal_cdf(sigma) - q_min) / (q_max - q_min)).clamp(0, 1)

    def icdf(self, q: Tensor) -> Tensor:
        q_min, q_max = self._ends
        mass = q_min + q.double() * (q_max - q_min)
        sigma: Tensor = (self.p_mean + self.p_std * torch.special.ndtri(mass)).exp()
        return sigma.clamp(self.sigma_min, self.sigma_max)


@dataclass(frozen=True)
class Tabulated(NoiseDistribution):
    """A distribution given by its CDF on an ascending grid of ln sigma, linear in between.

    Args:
        log_sigma: ascending grid.
        mass: CDF on that grid, non-decreasing; only its values between the two ends count.
    """

    log_sigma: tuple[float, ...]
    mass: tuple[float, ...]
    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)
        grid, mass = self._grid
        if len(grid) != len(mass) or len(grid) < 2 or bool((grid.diff() <= 0).any()):
            raise UsageError("a tabulated noise distribution needs an ascending grid and as many masses")
        if bool((mass.diff() < 0).any()) or self._ends[1] <= self._ends[0]:
            raise UsageError("a tabulated noise distribution needs a mass that rises within its range")

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.log_sigma).double(), torch.tensor(self.mass).double()

    @cached_property
    def _inverse(self) -> tuple[Numbers, Numbers]:
        """Mass and grid; where the mass is flat, a ramp far below rounding picks the order of its levels."""
        grid, mass = self._grid
        return (mass + torch.arange(len(mass)).double() * 1e-12).numpy(), grid.numpy()

    @cached_property
    def _ends(self) -> tuple[float, float]:
        grid, mass = self._grid
        low, high = interpolate(torch.tensor([self.sigma_min, self.sigma_max]).double().log(), grid, mass).tolist()
        return low, high

    def cdf(self, sigma: Tensor) -> Tensor:
        grid, mass = self._grid
        low, high = self._ends
        return ((interpolate(sigma.double().log(), grid, mass) - low) / (high - low)).clamp(0, 1)

    def icdf(self, q: Tensor) -> Tensor:
        """By NumPy, whose calls on a few numbers cost less than torch's: every update draws its levels here."""
        low, high = self._ends
        sigma = np.exp(np.interp(low + q.double().numpy() * (high - low), *self._inverse))
        return torch.as_tensor(sigma.clip(self.sigma_min, self.sigma_max))


def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear interpolation through (xs, ys), constant beyond the ends; xs ascending."""
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    share = ((x - x0) / (x1 - x0)).clamp(0, 1)
    return y0 + share * (y1 - y0)
