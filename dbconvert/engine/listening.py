"""How a block meets what the one before it delivers: added to its stream, position by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dbconvert.anatomy import Axes
from dbconvert.conditioning.modulation import fit
from dbconvert.graph.two_streams import positions_axis
from dbconvert.tasks.base import Change, Inputs

CONTEXT = "context"
"""Name of what blocks listen with, among what conversion adds."""


@dataclass(frozen=True)
class Arrival:
    """What reaches a block.

    Args:
        inputs: arguments of the network, batch of N.
        z: noisy targets, [N, d], [N, S, d] or images, or which tokens are hidden, [N, S].
        sigma: their levels, [N] or [N, S].
        heard: what the block before delivers: one vector an example, [N, d]; or as the stream's axes have it, and then
            of the last positions that the block runs on, or of more than these. Positions before them hear nothing.
    """

    inputs: Inputs
    z: Tensor
    sigma: Tensor
    heard: Tensor | None = None

    def some(self, where: Tensor, axes: Axes) -> Arrival:
        """Of some examples, [N] bool."""
        inputs = {name: value[where] for name, value in self.inputs.items()}
        return Arrival(inputs, self.z[where], self.sigma[where], rows_of(self.heard, where, axes))


def rows_of(heard: Tensor | None, where: Tensor, axes: Axes) -> Tensor | None:
    """What some examples hear, [N] bool; where other axes are folded into the batch an example has several rows."""
    if heard is None:
        return None
    axis = 0 if heard.dim() == 2 else axes.batch
    rows = where.repeat_interleave(heard.shape[axis] // len(where))
    return heard.movedim(axis, 0)[rows].movedim(0, axis)


def put(values: Tensor, where: Tensor, others: Tensor) -> Tensor:
    """values [N, ..] with those of some examples, [N] bool, replaced."""
    values = values.clone()
    values[where] = others
    return values


def listening(hearing: Callable[[Tensor], Tensor], heard: Tensor, axes: Axes, entry: Change | None) -> Change:
    """What happens to the stream as it enters: `entry`, and then what is made of what is heard is added.

    Args:
        hearing: what is heard to as many positions of the stream's width.
    """

    def enter(stream: Tensor) -> Tensor:
        stream = stream if entry is None else entry(stream)
        if heard.dim() < stream.dim():
            return stream + hearing(fit(heard, stream, axes)).to(stream.dtype)
        if heard.dim() != 3:
            return stream + hearing(heard).to(stream.dtype)
        sequence = positions_axis(axes)
        there, told = stream.shape[sequence], heard.shape[sequence]
        count = min(there, told)
        added = hearing(heard.narrow(sequence, told - count, count)).to(stream.dtype)
        behind = 2 - sequence  # F.pad counts axes from the last
        return stream + F.pad(added, [0, 0] * behind + [there - count, 0])

    return enter


def newest(before: Tensor | None, now: Tensor, axes: Axes) -> Tensor:
    """What a block has delivered, where a later evaluation ran on fewer positions, the last ones."""
    sequence = positions_axis(axes)
    missing = 0 if before is None else before.shape[sequence] - now.shape[sequence]
    if before is None or missing <= 0:
        return now
    return torch.cat([before.narrow(sequence, 0, missing), now], sequence)
