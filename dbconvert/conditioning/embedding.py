"""The embedding of a noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 16
LOWEST, HIGHEST = 0.5, 16.0
"""Angular frequencies over c_noise = ln(sigma)/4, which stays within about [-1.6, 1.1]."""


class NoiseEmbedding(nn.Module):
    """SiLU(MLP(sinusoidal(c_noise))): [N] -> [N, width], ready for the linear of each modulation."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        spaced = torch.linspace(math.log(LOWEST), math.log(HIGHEST), FREQUENCIES).exp()
        self.register_buffer("frequencies", spaced, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise[..., None] * self.frequencies
        out: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], -1))
        return out
