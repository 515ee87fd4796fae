"""AdaLN: shift and scale after a norm, a gate at the end of a branch (DiT, section 3.2; zero-initialised)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.anatomy import Axes
from dbconvert.errors import DBConvertError

Start = Literal["original", "zero"]
"""`original`: gates start at 1, the converted layer is the original; `zero`: gates start at 0, a pre-norm layer
is the identity, as in the paper."""

Curve = Literal["linear", "silu"]
"""What follows the linear that makes shifts, scales and gates: nothing, as in DiT, or SiLU, as in the paper's code."""


def curved(rows: Tensor, curve: Curve) -> Tensor:
    return F.silu(rows) if curve == "silu" else rows


class Modulation(nn.Module):
    """One layer's shifts, scales and gates from the conditioning vector: [N, width] -> rows [N, features], or
    [N, G, width] -> [N, G, features] where the positions of an example fall into G groups of one length.

    Args:
        width: of the conditioning vector.
        norms: channel sizes of the norm sites, each taking a shift and a scale.
        gates: channel sizes of the gate sites.
        start: what the gates are while the weights are still zero.
    """

    def __init__(
        self, width: int, norms: tuple[int, ...], gates: tuple[int, ...], start: Start, curve: Curve = "linear"
    ) -> None:
        super().__init__()
        self.norms, self.gates, self.curve = norms, gates, curve
        self.gate_offset = 1.0 if start == "original" else 0.0
        self.linear = nn.Linear(width, 2 * sum(norms) + sum(gates))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor, same: int = 0) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """((shift, scale) for each norm site, gate for each gate site).

        Args:
            same: of [N, G, width], so many groups at the beginning have one and the same vector in all examples.
        """
        sizes = [size for features in self.norms for size in (features, features)] + list(self.gates)
        rows = torch.split(self.once(condition, same) if same else self.rows(condition), sizes, -1)
        count = 2 * len(self.norms)
        pairs = [(rows[i], rows[i + 1]) for i in range(0, count, 2)]
        return pairs, [self.gate_offset + row for row in rows[count:]]

    def rows(self, condition: Tensor) -> Tensor:
        return curved(self.linear(condition), self.curve)

    def once(self, condition: Tensor, same: int) -> Tensor:
        """Of groups whose vector is the same the rows are computed once."""
        first = self.rows(condition[:1, :1]).expand(len(condition), same, -1)
        return first if same == condition.shape[1] else torch.cat([first, self.rows(condition[:, same:])], 1)


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


def laid(x: Tensor, vectors: tuple[Tensor, ...], axes: Axes) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x, its positions cut into groups where a vector is for several of them, and the vectors shaped to multiply it.

    x is [N, P, features] or [P, N, features]; or [N P, features], each example's rows together.

    Args:
        vectors: [N, features], or one a group, [N, G, features].
    """
    if vectors[0].dim() == 2:
        return x, tuple(fit(vector, x, axes) for vector in vectors)
    examples, groups = vectors[0].shape[:2]
    channel = axes.channel + x.dim()
    others = [i for i in range(x.dim()) if i not in (axes.batch, channel)]
    if x.shape[axes.batch] != examples or not others:
        return x, tuple(fit(vector.flatten(0, 1), x, axes) for vector in vectors)
    if len(others) != 1:
        raise DBConvertError(
            f"a value of shape {list(x.shape)} has no single axis of positions to condition one by one",
            hint="condition whole examples instead",
        )
    place = others[0]
    order = [i for _, i in sorted([(axes.batch, 0), (place, 1), (channel, 2)])]
    shaped = tuple(vector.permute(order).to(x.dtype) for vector in vectors)
    if x.shape[place] == groups:
        return x, shaped
    return x.unflatten(place, (groups, -1)), tuple(vector.unsqueeze(place + 1) for vector in shaped)  # type: ignore[no-untyped-call]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, axes: Axes) -> Tensor:
    """x (1 + scale) + shift, with a row an example, or one a group of its positions."""
    cut, (shift, scale) = laid(x, (shift, scale), axes)
    out = (cut * (1 + scale)).add_(shift)
    return out if cut is x else out.reshape(x.shape)


def gate(x: Tensor, by: Tensor, axes: Axes) -> Tensor:
    """x times a row an example, or one a group of its positions."""
    cut, (by,) = laid(x, (by,), axes)
    return cut * by if cut is x else (cut * by).reshape(x.shape)


def condition_width(layer_parameters: int, outputs: int, share: float = 0.03, least: int = 32) -> int:
    """The widest conditioning vector, a multiple of 8, whose linear stays within `share` of a layer's parameters.

    Args:
        layer_parameters: of the smallest layer.
        outputs: rows of its modulation, 2 x norms + gates, in features.
        least: never narrower than this.
    """
    widest = int(share * layer_parameters / max(outputs, 1)) - 1
    return max(least, widest // 8 * 8)
