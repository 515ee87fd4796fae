"""Masking schedules: alpha(t), the probability that a token is visible at time t in (0, 1] (MD4, Shi et al. 2024).

alpha falls from 1 at t = 0 to 0 at t = 1. Blocks take equal decrements of it, alpha(t_b) = 1 - b/B, so that 1 - alpha
is the distribution whose equal masses they are; block 0 owns the latest times. Within its interval a block draws t
evenly and weights its cross-entropy by -alpha'(t) / (1 - alpha(t)). All arithmetic is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dbconvert.diffusion.distributions import NoiseDistribution
from dbconvert.errors import UsageError

Schedule = Literal["linear", "cosine", "polynomial"]
LEAST = 1e-3
"""Where fewer tokens are masked than this, the weight would be without bound: what lies below counts at its time."""


@dataclass(frozen=True)
class Masking(NoiseDistribution):
    """One schedule, as a distribution of t on [sigma_min, sigma_max] = [alpha^-1(1 - LEAST), 1].

    `linear` is alpha = 1 - t, `cosine` is 1 - cos(pi/2 (1 - t)), `polynomial` is 1 - t^power.
    """

    schedule: Schedule = "linear"
    power: float | None = None
    logarithmic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.power is not None) != (self.schedule == "polynomial"):
            raise UsageError(
                f"schedule {self.schedule} with power {self.power}",
                hint="noise.power belongs to noise.schedule=polynomial, which needs one: 2 masks late tokens faster",
            )
        if self.power is not None and self.power <= 0:
            raise UsageError(f"power {self.power} must be positive")

    @property
    def sigma_min(self) -> float:  # type: ignore[override]
        return float(self.time(torch.tensor(1 - LEAST, dtype=torch.float64)))

    @property
    def sigma_max(self) -> float:  # type: ignore[override]
        return 1.0

    # -- the schedule -------------------------------------------------------------------------------------

    def masked(self, t: Tensor) -> Tensor:
        """1 - alpha(t), the share of tokens that is masked."""
        t = t.double()
        if self.schedule == "cosine":
            return (math.pi / 2 * t).sin()
        return t if self.power is None else t**self.power

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.masked(t)

    def falling(self, t: Tensor) -> Tensor:
        """-alpha'(t)."""
        t = t.double()
        if self.schedule == "cosine":
            return math.pi / 2 * (math.pi / 2 * t).cos()
        return torch.ones_like(t) if self.power is None else self.power * t ** (self.power - 1)

    def time(self, alpha: Tensor) -> Tensor:
        """The inverse of `alpha`."""
        masked = 1 - alpha.double()
        if self.schedule == "cosine":
            return masked.asin() * 2 / math.pi
        return masked if self.power is None else masked ** (1 / self.power)

    def weight(self, t: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)): with it the loss over even t is the negative evidence bound, in nats."""
        return self.falling(t) / self.masked(t)

    def revealed(self, t: float, earlier: float) -> float:
        """The probability that a token masked at t is visible at an earlier time."""
        before, now = self.masked(torch.tensor([earlier, t], dtype=torch.float64)).tolist()
        return float(1 - before / now)

    @staticmethod
    def c_noise(t: Tensor) -> Tensor:
        """What the embedder is fed: t on [-1, 1]."""
        return 2 * t - 1

    # -- as a distribution --------------------------------------------------------------------------------

    def cdf(self, sigma: Tensor) -> Tensor:
        t = sigma.double()
        return torch.where(t > self.sigma_min, self.masked(t.clamp(0, 1)), 0.0)

    def icdf(self, q: Tensor) -> Tensor:
        return self.time(1 - q.double()).clamp(self.sigma_min, 1)

    def between(self, low: float, high: float, uniform: Tensor) -> Tensor:
        """Evenly spread times; the weight makes up for it."""
        return low + uniform.double() * (high - low)

    def widened(self, low: float, high: float, share: float) -> tuple[float, float]:
        reach = share * (high - low)
        return low - reach, high + reach

    def evenly(self, shares: Tensor) -> Tensor:
        return self.sigma_min + shares.double() * (1 - self.sigma_min)

    def spaced(self, shares: Tensor) -> Tensor:
        return self.evenly(shares)

    def density(self, log_sigma: Tensor, step: float = 1e-3) -> Tensor:
        """Density over t, not over its logarithm."""
        return self.falling(log_sigma)
