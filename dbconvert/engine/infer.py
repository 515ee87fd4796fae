"""From noise to a prediction: the sampler runs one block at every level."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.sampling import euler_step, levels
from dbconvert.engine.cascade import refuse_gaps
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.tasks.base import Change, Inputs

Begin = Literal["zero", "noise"]
"""Where sampling starts: at z = 0, the mean of the noise, or at a draw of it."""


@torch.no_grad()
def sample(
    network: BlockwiseNetwork,
    intervals: Intervals,
    inputs: Inputs,
    *,
    steps: int | None = None,
    begin: Begin | Tensor = "zero",
    generator: torch.Generator | None = None,
    change: Change | None = None,
) -> Iterator[Tensor]:
    """The network's output at every level, first to last: `steps` evaluations, B + 1 by default, or as many as a
    looped core had rounds.

    Args:
        begin: where; or the draw of unit noise itself.
        generator: of a draw.
        change: what is done to every output.

    Every evaluation runs the block that owns its level, which hears what the block before has last delivered; z moves
    between them by Euler steps towards the expected target. The last output is the prediction.
    """
    first = next(iter(inputs.values()))
    shape = network.task.target_shape(inputs)
    z = torch.zeros(shape, device=first.device)
    if isinstance(begin, Tensor) or begin == "noise":
        eps = begin if isinstance(begin, Tensor) else torch.randn(shape, generator=generator)
        z = eps.to(first.device) * intervals.boundaries[-1]
    said: dict[int, Tensor | None] = {}
    grid = levels(intervals, steps or network.task.evaluations)
    refuse_gaps(network, intervals, grid)
    with network.prelude_kept():
        for i, sigma in enumerate(grid):
            level = torch.full((len(first),), sigma, device=first.device)
            block = intervals.block_of(sigma)
            more = i + 1 < len(grid)
            output = network.denoise(block, inputs, z, level, heard=said.get(block - 1), tells=more)
            output = output if change is None else change(output)
            yield output
            if more:
                denoised = network.task.denoised(network.model, output)
                said[block] = network.delivered(denoised, z, inputs)
                z = euler_step(z, denoised, sigma, grid[i + 1])


def ends(outputs: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The first and the last of the outputs that `sample` gives; the others are not held."""
    first = last = None
    for last in outputs:
        first = last if first is None else first
    assert first is not None and last is not None
    return first, last
