"""From noise to a prediction: the sampler runs one block at every level."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.sampling import euler_step, levels
from dbconvert.engine.cascade import refuse_gaps
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.tasks.base import Inputs

Begin = Literal["zero", "noise"]
"""Where sampling starts: at z = 0, the mean of the noise, or at a draw of it."""


@torch.no_grad()
def sample(
    network: BlockwiseNetwork,
    intervals: Intervals,
    inputs: Inputs,
    *,
    steps: int | None = None,
    begin: Begin = "zero",
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """The network's output at every level, first to last: `steps` evaluations, B + 1 by default.

    Every evaluation runs the block that owns its level, which hears what the block before has last delivered; z moves
    between them by Euler steps towards the expected target. The last output is the prediction.
    """
    first = next(iter(inputs.values()))
    shape = network.task.target_shape(inputs)
    z = torch.zeros(shape, device=first.device)
    if begin == "noise":
        eps = torch.randn(shape, generator=generator)
        z = eps.to(first.device) * intervals.boundaries[-1]
    outputs: list[Tensor] = []
    said: dict[int, Tensor | None] = {}
    grid = levels(intervals, steps)
    refuse_gaps(network, intervals, grid)
    for i, sigma in enumerate(grid):
        level = torch.full((len(first),), sigma, device=first.device)
        block = intervals.block_of(sigma)
        more = i + 1 < len(grid)
        outputs.append(network.denoise(block, inputs, z, level, heard=said.get(block - 1), tells=more))
        if more:
            denoised = network.task.denoised(network.model, outputs[-1])
            said[block] = network.delivered(denoised, z)
            z = euler_step(z, denoised, sigma, grid[i + 1])
    return outputs
