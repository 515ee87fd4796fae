"""Cutting a noise range into one interval a block.

Numbering, everywhere: boundaries ascend; blocks count from 0; block 0 owns the highest noise, so block b of B
owns (boundary[B-1-b], boundary[B-b]].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dbconvert.diffusion.distributions import NoiseDistribution
from dbconvert.errors import UsageError

Partition = Literal["equal-mass", "uniform"]
TIE = 1e-6
"""A sigma this close (relative) to a boundary lies on it, and belongs to the lower-noise block."""


def boundaries(distribution: NoiseDistribution, blocks: int, partition: Partition = "equal-mass") -> list[float]:
    """The B + 1 ascending boundaries of B intervals.

    `equal-mass` gives every block 1/B of the distribution (paper, section 3.3); `uniform` gives every block
    the same width in ln sigma, or in time (the paper's ablation).
    """
    if blocks < 1:
        raise UsageError(f"{blocks} blocks: at least one is needed")
    shares = torch.linspace(0, 1, blocks + 1, dtype=torch.float64)
    low, high = distribution.sigma_min, distribution.sigma_max
    if partition == "equal-mass":
        inner = distribution.icdf(shares[1:-1]).tolist()
    else:
        inner = distribution.evenly(shares[1:-1]).tolist()
    return [low, *inner, high]


@dataclass(frozen=True)
class Intervals:
    """The noise intervals of B blocks over one distribution.

    Args:
        distribution: where training draws and sampling grids come from.
        boundaries: B + 1 ascending levels.
        overlap: the paper's gamma; a training interval reaches this share of its width, in ln sigma or in time, into
            its neighbours on either side.
    """

    distribution: NoiseDistribution
    boundaries: tuple[float, ...]
    overlap: float = 0.05

    def __post_init__(self) -> None:
        pairs = zip(self.boundaries, self.boundaries[1:], strict=False)
        if len(self.boundaries) < 2 or any(a >= b for a, b in pairs) or self.boundaries[0] <= 0:
            raise UsageError(f"noise boundaries must be positive and ascend, not {list(self.boundaries)}")
        if self.overlap < 0:
            raise UsageError(f"overlap {self.overlap} must not be negative")

    @property
    def blocks(self) -> int:
        return len(self.boundaries) - 1

    def whole(self) -> Intervals:
        """One interval of all levels."""
        return Intervals(self.distribution, (self.boundaries[0], self.boundaries[-1]), 0.0)

    def owned(self, block: int) -> tuple[float, float]:
        """(low, high] of the levels that block serves at inference."""
        return self.boundaries[self.blocks - 1 - block], self.boundaries[self.blocks - block]

    def training(self, block: int) -> tuple[float, float]:
        """The levels that block is trained on: its own, widened by the overlap and clamped to the range."""
        low, high = self.distribution.widened(*self.owned(block), self.overlap)
        return max(low, self.boundaries[0]), min(high, self.boundaries[-1])

    def share(self, block: int) -> float:
        """Share of the distribution's mass (entropy, where it was fitted to one) in the block's own interval."""
        low, high = self.distribution.cdf(torch.tensor(self.owned(block), dtype=torch.float64))
        return float(high - low)

    def block_of(self, sigma: float) -> int:
        """The block that serves sigma: ties go to the lower-noise block, levels beyond the ends to the end blocks."""
        above = sum(sigma > boundary * (1 + TIE) for boundary in self.boundaries[1:-1])
        return self.blocks - 1 - above

    def draw(self, block: int, uniform: Tensor) -> Tensor:
        """Training levels of a block, within its training interval, from numbers in [0, 1).

        Returns float32 of uniform's shape and device.
        """
        drawn = self.distribution.between(*self.training(block), uniform.detach().cpu())
        return drawn.to(uniform.device, torch.float32)


def stratified(count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` numbers in [0, 1), one in each of `count` equal cells, in random order: [count]."""
    jitter = torch.rand(count, generator=generator, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    return (order + jitter[order]) / count
