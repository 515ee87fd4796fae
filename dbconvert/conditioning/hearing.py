"""What a block hears of the one before it: a linear map onto its own stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.anatomy import Axes


class Hearing(nn.Module):
    """Maps what a predecessor delivers to what is added to the stream as it enters the block.

    It begins at zero: a block that has not learnt to listen is one that hears nothing.

    Args:
        heard: channels of what is delivered.
        width: of the stream.
        axes: of both.
        norm: bring each position to a root mean square of 1 first.
    """

    def __init__(self, heard: int, width: int, axes: Axes, *, norm: bool) -> None:
        super().__init__()
        self.axes, self.norm = axes, norm
        self.linear = nn.Linear(heard, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, heard: Tensor) -> Tensor:
        """[.., heard] to [.., width], the channels where the axes say."""
        values = heard.movedim(self.axes.channel, -1)
        if self.norm:
            values = F.rms_norm(values.float(), values.shape[-1:]).to(values.dtype)
        out: Tensor = self.linear(values)
        return out.movedim(-1, self.axes.channel)
