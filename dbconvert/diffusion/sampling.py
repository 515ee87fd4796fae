"""From noise to a prediction: grids of levels and the Euler step (EDM, algorithm 1 without churn)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dbconvert.diffusion.distributions import NoiseDistribution
from dbconvert.diffusion.intervals import Intervals
from dbconvert.errors import UsageError

Grid = Literal["quantiles", "karras"]
KARRAS_RHO = 7


def sigma_grid(distribution: NoiseDistribution, evaluations: int, grid: Grid = "quantiles") -> list[float]:
    """Descending levels of N network evaluations: N - 1 Euler moves and a readout at sigma_min.

    `quantiles` spaces them equally in the distribution's mass (in time, where tokens are masked); `karras` is EDM's
    eq. 5 with rho = 7.
    """
    if evaluations < 1:
        raise UsageError(f"{evaluations} sampling steps: at least one is needed")
    low, high = distribution.sigma_min, distribution.sigma_max
    if evaluations == 1:
        return [high]
    shares = torch.linspace(1, 0, evaluations, dtype=torch.float64)
    if grid == "quantiles":
        inner = distribution.spaced(shares[1:-1]).tolist()
    else:
        roots = low ** (1 / KARRAS_RHO) + shares[1:-1] * (high ** (1 / KARRAS_RHO) - low ** (1 / KARRAS_RHO))
        inner = (roots**KARRAS_RHO).tolist()
    return [high, *inner, low]


def levels(intervals: Intervals, evaluations: int | None = None) -> list[float]:
    """Levels to sample at: by default the B + 1 boundaries, so that every block runs, the last one as readout too."""
    if evaluations is None:
        return list(reversed(intervals.boundaries))
    return sigma_grid(intervals.distribution, evaluations)


def draw_tokens(scores: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """A token for every position, [N, S], from scores [N, S, K]; the Gumbel trick keeps draws apart by position.

    Args:
        temperature: 0 takes the likeliest.
        generator: on the CPU.
    """
    if temperature == 0:
        return scores.argmax(-1)
    uniform = torch.rand(scores.shape, generator=generator).clamp(1e-20, 1 - 1e-7).to(scores.device)
    return (scores.float() / temperature - (-uniform.log()).log()).argmax(-1)


def euler_step(z: Tensor, denoised: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """z + (sigma_next - sigma) (z - D) / sigma, which is a z + (1 - a) D with a = sigma_next / sigma.

    The paper prints the opposite sign in its Eq. (3)-(5); that form adds noise. Levels may be one for all or one an
    example, [N]: the same levels give the same bits.
    """
    here, there = (
        level.to(z) if isinstance(level, Tensor) else torch.full((), level, dtype=z.dtype, device=z.device)
        for level in (sigma, sigma_next)
    )
    keep = there / here
    if keep.dim():
        keep = keep.reshape(keep.shape + (1,) * (z.dim() - keep.dim()))
    return keep * z + (1 - keep) * denoised
