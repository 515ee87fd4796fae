"""AdaLN: shift and scale after a norm, a gate at the end of a branch (DiT, section 3.2; zero-initialised)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from dbconvert.anatomy import Axes

Start = Literal["original", "zero"]
"""`original`: gates start at 1, the converted layer is the original; `zero`: gates start at 0, a pre-norm layer
is the identity, as in the paper."""


class Modulation(nn.Module):
    """One layer's shifts, scales and gates from the conditioning vector: [N, width] -> rows [N, features].

    Args:
        width: of the conditioning vector.
        norms: channel sizes of the norm sites, each taking a shift and a scale.
        gates: channel sizes of the gate sites.
        start: what the gates are while the weights are still zero.
    """

    def __init__(self, width: int, norms: tuple[int, ...], gates: tuple[int, ...], start: Start) -> None:
        super().__init__()
        self.norms, self.gates = norms, gates
        self.gate_offset = 1.0 if start == "original" else 0.0
        self.linear = nn.Linear(width, 2 * sum(norms) + sum(gates))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """((shift, scale) for each norm site, gate for each gate site)."""
        sizes = [size for features in self.norms for size in (features, features)] + list(self.gates)
        rows = self.linear(condition).split(sizes, -1)
        count = 2 * len(self.norms)
        pairs = [(rows[i], rows[i + 1]) for i in range(0, count, 2)]
        return pairs, [self.gate_offset + row for row in rows[count:]]


def fit(vector: Tensor, like: Tensor, axes: Axes) -> Tensor:
    """A vector an example, [N, features], shaped to multiply `like`.

    Where the layer has folded other axes into the batch (B*S rows, or windows), each example's vector is
    repeated for its rows, which lie together.
    """
    rows = like.shape[axes.batch]
    if vector.shape[0] != rows:
        vector = vector.repeat_interleave(rows // vector.shape[0], 0)
    channel = axes.channel + like.dim()
    shape = [1] * like.dim()
    shape[axes.batch], shape[channel] = rows, vector.shape[1]
    ordered = vector if axes.batch < channel else vector.transpose(0, 1)
    return ordered.reshape(shape).to(like.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, axes: Axes) -> Tensor:
    """x (1 + scale) + shift, with a row an example."""
    return x * (1 + fit(scale, x, axes)) + fit(shift, x, axes)


def gate(x: Tensor, by: Tensor, axes: Axes) -> Tensor:
    return x * fit(by, x, axes)


def condition_width(layer_parameters: int, outputs: int, share: float = 0.03, least: int = 32) -> int:
    """The widest conditioning vector, a multiple of 8, whose linear stays within `share` of a layer's parameters.

    Args:
        layer_parameters: of the smallest layer.
        outputs: rows of its modulation, 2 x norms + gates, in features.
        least: never narrower than this.
    """
    widest = int(share * layer_parameters / max(outputs, 1)) - 1
    return max(least, widest // 8 * 8)
