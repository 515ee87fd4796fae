"""What networks predict, and the change of variables that makes D(x, sigma) = c_skip x + c_out F(c_in x, t) of each.

x = y + sigma eps is variance exploding. A network that was trained otherwise gets the c_in x and the t of its own
schedule. With abar the share of the variance that is left of the image, sigma^2 = (1 - abar) / abar, so that c_in =
sqrt(abar) = 1 / sqrt(1 + sigma^2) (Song et al. 2021, DDIM, eq. 13); a flow x_t = (1 - t) y + t eps (Lipman et al. 2023;
Liu et al. 2023) has sigma = t / (1 - t), so that c_in = 1 - t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dbconvert.diffusion.distributions import interpolate
from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.schema import Positive, PositiveFloat, record

Predicted = Literal["edm", "epsilon", "v", "flow"]
Betas = Literal["linear", "scaled_linear", "cosine"]
COSINE_OFFSET, LARGEST_BETA = 0.008, 0.999


@record
class Times:
    """The schedule that a network was trained with.

    Args:
        betas: of `epsilon` and `v`: linear, linear in their square roots, or such that abar is a cosine (Nichol &
            Dhariwal 2021, eq. 17).
        steps: how many, so that its times are 0 to steps - 1.
        beta_start, beta_end: of the linear ones.
        scale: of `flow`, the time of pure noise: 1, or 1000.
    """

    betas: Betas = "linear"
    steps: Positive = 1000
    beta_start: PositiveFloat = 0.0001
    beta_end: PositiveFloat = 0.02
    scale: PositiveFloat = 1.0

    def in_words(self, kind: Predicted) -> str:
        if kind == "flow":
            return f"times up to {self.scale:g}"
        ends = "" if self.betas == "cosine" else f" from {self.beta_start:g} to {self.beta_end:g}"
        return f"{self.steps} times, betas {self.betas}{ends}"

    def log_sigmas(self) -> Tensor:
        """ln sigma of every time, ascending, [steps], float64."""
        if self.betas == "cosine":
            ends = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            left = ((ends + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).cos().square()
            betas = (1 - left[1:] / left[:-1]).clamp(max=LARGEST_BETA)
        elif self.betas == "scaled_linear":
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64).square()
        else:
            betas = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)
        left = (1 - betas).cumprod(0)
        return ((1 - left) / left).log() / 2


@record
class Prediction:
    """What a network predicts, and the times it knows."""

    kind: Predicted = "edm"
    times: Times = Times()

    def range(self) -> tuple[float, float] | None:
        """The lowest and the highest sigma that it was trained on; None where it has no bounds."""
        if self.kind not in ("epsilon", "v"):
            return None
        ends = self.times.log_sigmas()[[0, -1]].exp()
        return float(ends[0]), float(ends[1])

    def time(self, sigma: Tensor) -> Tensor:
        """The network's own time for a level, of sigma's shape: between two of its times by ln sigma."""
        if self.kind == "edm":
            return Preconditioning(1.0).c_noise(sigma)
        if self.kind == "flow":
            return sigma / (1 + sigma) * self.times.scale
        grid = self.times.log_sigmas().to(sigma.device)
        time = interpolate(sigma.double().log(), grid, torch.arange(len(grid), device=sigma.device).double())
        return time.to(sigma.dtype)

    def scalings(self, sigma: Tensor, edm: Preconditioning) -> Scalings:
        """Of sigma's shape.

        Args:
            edm: of networks that are preconditioned so.
        """
        if self.kind == "edm":
            return Scalings(edm.c_skip(sigma), edm.c_out(sigma), edm.c_in(sigma))
        if self.kind == "flow":  # F = eps - y, so y = x_t - t F
            return Scalings(1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma))
        root = 1 / (1 + sigma.square()).sqrt()
        if self.kind == "epsilon":  # y = x - sigma F
            return Scalings(torch.ones_like(sigma), -sigma, root)
        return Scalings(root.square(), -sigma * root, root)  # F = sqrt(abar) eps - sqrt(1 - abar) y


@dataclass(frozen=True)
class Scalings:
    """D = skip x + out F(into x, t)."""

    skip: Tensor
    out: Tensor
    into: Tensor
