"""Two sequences in one pass through the layers: [clean ; noisy], each noisy position after its clean prefix.

Position i of the noisy sequence sees clean positions before i and itself; the clean sequence sees itself as ever. The
stem runs on both as examples of one batch, so that positions are counted once; between the stem and the readout they
lie one behind the other. What a layer may see is read off the mask that it was given for the clean sequence alone,
which keeps windows, padding and biases that go by index as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dbconvert.anatomy import Axes, Path, SideAxes
from dbconvert.errors import DBConvertError
from dbconvert.graph.functions import uncounted

ATTENTION = F.scaled_dot_product_attention
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class TwoStreams:
    """What happens to one forward pass on a batch of 2N examples, N clean ones and then N noisy ones.

    Args:
        length: positions S of one sequence.
        axes: of the stream.
        sides: what the layers receive beside the stream, by argument.
        together: [N, S, S] bool, which positions belong to one document; None when all do.
    """

    def __init__(self, length: int, axes: Axes, sides: Mapping[Path, SideAxes], together: Tensor | None = None) -> None:
        self.length, self.axes, self.sides, self.together = length, axes, sides, together
        self.sequence = positions_axis(axes)
        self.masks: dict[object, tuple[Tensor, Tensor]] = {}

    def enter(self, stream: Tensor) -> Tensor:
        """[2N, S, d] -> [N, 2S, d]."""
        return torch.cat(stream.chunk(2, self.axes.batch), self.sequence)

    def leave(self, stream: Tensor) -> Tensor:
        """[N, 2S, d] -> the noisy [N, S, d]."""
        return stream.narrow(self.sequence, self.length, self.length)

    def beside(self, path: Path, value: Tensor) -> Tensor:
        """A side input of 2N sequences of S positions as one of N sequences of 2S.

        Raises:
            DBConvertError: the analysis has not seen this argument.
        """
        known = known_side(self.sides, path, value)
        clean = value if known.batch is None else value.chunk(2, known.batch)[0]
        if len(known.sequence) == 1:
            return torch.cat([clean, clean], known.sequence[0])
        return self.mask(clean, made_of=value) if known.sequence else clean

    def attention(self, _: object) -> TorchFunctionMode:
        return _Attention(self)

    def mask(self, given: Tensor, made_of: Tensor) -> Tensor:
        """The mask of both sequences from that of one, [..., S, S]; one a pass for all that are made of one tensor."""
        key = id(made_of)
        if key not in self.masks:
            self.masks[key] = made_of, two_stream_mask(given, self.together)  # kept alive: its id is the key
        return self.masks[key][1]

    @cached_property
    def whole(self) -> Tensor:
        return torch.ones(self.length, self.length, dtype=torch.bool)

    @cached_property
    def causal(self) -> Tensor:
        return self.whole.tril()


class _Attention(TorchFunctionMode):
    """Gives attention over both sequences the mask for it."""

    def __init__(self, streams: TwoStreams) -> None:
        super().__init__()
        self.streams = streams

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not ATTENTION:
            return func(*args, **(kwargs or {}))
        given = attention_arguments(args, kwargs or {})
        length = self.streams.length
        if given["query"].shape[-2] == given["key"].shape[-2] == 2 * length:
            with uncounted():
                given["attn_mask"] = self.mask(given, length)
            given["is_causal"] = False
        return func(**given)

    def mask(self, given: dict[str, Any], length: int) -> Tensor:
        mask: Tensor | None = given.get("attn_mask")
        if mask is not None:
            clean = mask.chunk(2)[0] if mask.shape[0] == 2 * given["query"].shape[0] else mask
            # One made of both sequences by index, or by `beside` already, holds that of the clean one in its corner.
            return self.streams.mask(clean[..., :length, :length], made_of=mask)
        visible = self.streams.causal if given.get("is_causal") else self.streams.whole
        shape = (1,) * (given["query"].dim() - 2) + visible.shape
        return self.streams.mask(visible.to(given["query"].device).view(shape), made_of=visible)


def known_side(sides: Mapping[Path, SideAxes], path: Path, value: Tensor) -> SideAxes:
    """What is known of a tensor that a layer receives beside the stream.

    Raises:
        DBConvertError: the analysis has not seen this argument.
    """
    if path not in sides:
        raise DBConvertError(
            f"the layers receive a tensor {list(value.shape)} at {'.'.join(map(str, path))}, which they did not "
            "when the network was analysed",
            hint="leave that argument out, or split again with an example_inputs() that gives it",
        )
    return sides[path]


def positions_axis(axes: Axes) -> int:
    """The axis of positions of a stream of examples, positions and channels."""
    return next(i for i in range(3) if i not in (axes.batch, axes.channel + 3))


def attention_arguments(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of torch's attention by name."""
    return {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}


SAMPLED = 4096


def spread(look_up: Callable[[Tensor], Tensor], rows: int, device: torch.device) -> Tensor:
    """The root mean square of token embeddings as they enter the stem, over the first rows of their table."""
    with torch.no_grad():
        found: Tensor = look_up(torch.arange(min(rows, SAMPLED), device=device)[None])
        return found.float().square().mean().sqrt()


def two_stream_mask(given: Tensor, together: Tensor | None = None) -> Tensor:
    """[..., S, S], True or 0 where a position is seen, to [..., 2S, 2S].

    Args:
        given: bool, or added to the scores.
        together: [N, S, S] bool; positions of other documents are not seen.
    """
    length = given.shape[-1]
    ones = torch.ones(length, length, dtype=torch.bool, device=given.device)
    before, itself = ones.tril(-1), torch.eye(length, dtype=torch.bool, device=given.device)
    if together is not None:
        shape = (len(together), *[1] * max(given.dim() - 3, 0), length, length)
        ones, before = ones & together.view(shape), before & together.view(shape)
        given = given.expand(torch.broadcast_shapes(given.shape, shape))  # type: ignore[no-untyped-call]
    hidden = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
    own = itself if given.dtype == torch.bool else given.diagonal(dim1=-2, dim2=-1).diag_embed()
    clean = torch.where(ones, given, hidden)
    seen = torch.where(before, given, hidden)
    alone = torch.where(itself, own, hidden).expand(seen.shape)
    nothing = torch.full_like(clean, hidden)
    return torch.cat([torch.cat([clean, nothing], -1), torch.cat([seen, alone], -1)], -2)
