"""A clean prefix, cached: the keys and values of positions that do not change, kept layer by layer.

The stem runs on the whole sequence, which is cheap and keeps positions and masks as they are; the layers run on what is
new. Keys and values are met where torch's attention takes them, so that it works for every network whose layers mix
positions there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dbconvert.anatomy import Axes, Path, SideAxes
from dbconvert.errors import DBConvertError
from dbconvert.graph.attention import ATTENTION, attention_arguments
from dbconvert.graph.functions import uncounted
from dbconvert.graph.rows import LINEAR, of_two_rows
from dbconvert.graph.two_streams import positions_axis

Pair = tuple[Tensor, Tensor]


class Prefix:
    """The cache of one block; it steers one forward pass after another on a growing sequence, without gradients.

    Args:
        axes: of the stream.
        sides: what the layers receive beside the stream, by argument.

    Attributes:
        enclosed: whether torch.nn.MultiheadAttention was met, inside of which nothing is.
    """

    def __init__(self, axes: Axes, sides: Mapping[Path, SideAxes]) -> None:
        self.axes, self.sides = axes, sides
        self.sequence = positions_axis(axes)
        self.kept: dict[object, Pair] = {}
        self.masks: dict[torch.dtype, Tensor] = {}
        self.filled = self.length = 0
        self.enclosed = False

    def begin(self, length: int) -> None:
        """Before a pass on `length` positions, of which the last is not to be kept."""
        self.length = length
        self.masks.clear()

    def end(self) -> None:
        """After it: all positions but the last are cached now.

        Raises:
            DBConvertError: no layer attended where keys and values are met.
        """
        if not self.kept and self.enclosed:
            raise DBConvertError("attention inside torch.nn.MultiheadAttention keeps its keys and values to itself")
        if not self.kept:
            raise DBConvertError("the layers do not mix positions in torch's attention, so that nothing can be cached")
        self.filled = self.length - 1

    @property
    def new(self) -> int:
        """Positions that the layers run on."""
        return self.length - self.filled

    def last(self, value: Tensor, axis: int, count: int) -> Tensor:
        return value.narrow(axis, value.shape[axis] - count, count)

    def enter(self, stream: Tensor) -> Tensor:
        return self.last(stream, self.sequence, self.new)

    def beside(self, path: Path, value: Tensor) -> Tensor:
        """Positions of what is new; masks keep the columns of the prefix."""
        known = self.sides.get(path)
        if known is None or not known.sequence:
            return value
        return self.last(value, known.sequence[0], self.new)

    def attention(self, layer: object) -> TorchFunctionMode:
        return _Cached(self, layer)

    def meet(self, key: object, pair: Pair) -> Pair:
        """Keys and values of the prefix and of what is new, written behind those of the prefix."""
        kept = self.kept.get(key)
        if kept is None or kept[0].shape[-2] < self.length or kept[0].shape[-3] != pair[0].shape[-3]:
            kept = self.kept[key] = self.room(0, pair[0], kept), self.room(1, pair[1], kept)
        for place, tensor in zip(kept, pair, strict=True):
            place.narrow(-2, self.filled, self.new).copy_(tensor)
        return kept[0].narrow(-2, 0, self.length), kept[1].narrow(-2, 0, self.length)

    def room(self, which: int, new: Tensor, before: Pair | None) -> Tensor:
        """Place for twice the length, with as many heads as the new ones have; what is there already is copied."""
        place = new.new_empty(*new.shape[:-2], 2 * self.length, new.shape[-1])
        if before is not None:
            place.narrow(-2, 0, self.filled).copy_(with_heads(before[which], new.shape[-3])[..., : self.filled, :])
        return place

    def mask(self, query: Tensor) -> Tensor | None:
        """What new positions see when each sees those before it, added to the scores; None where that is everything."""
        if self.new == 1:
            return None
        if query.dtype not in self.masks:
            unseen = torch.full((self.new, self.length), -torch.inf, dtype=query.dtype, device=query.device)
            self.masks[query.dtype] = unseen.triu(self.filled + 1)
        return self.masks[query.dtype]


class _Cached(TorchFunctionMode):
    """Attention over the cached prefix too, while one layer runs."""

    def __init__(self, prefix: Prefix, layer: object) -> None:
        super().__init__()
        self.prefix, self.layer, self.calls = prefix, layer, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is LINEAR and self.prefix.new == 2:
            return of_two_rows(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            self.prefix.enclosed = True
        if func is not ATTENTION:
            return func(*args, **(kwargs or {}))
        given = attention_arguments(args, kwargs or {})
        prefix = self.prefix
        if given["key"].shape[-2] != prefix.new:
            return func(**given)
        with uncounted():
            key = self.layer, self.calls
            given["key"], given["value"] = prefix.meet(key, (given["key"], given["value"]))
            if prefix.filled and given.get("attn_mask") is None and given.get("is_causal"):
                given["attn_mask"], given["is_causal"] = prefix.mask(given["query"]), False
        self.calls += 1
        return func(**given)


def with_heads(tensor: Tensor, heads: int) -> Tensor:
    """[..., h, S, d] with another number of heads: those that query heads share come once, or once for each of them."""
    there = tensor.shape[-3]
    if there < heads:
        return tensor.repeat_interleave(heads // there, -3)
    return tensor[..., :: there // heads, :, :]
