"""Two sequences in one pass through the layers: [clean ; noisy], each noisy position after its clean prefix.

Position i of the noisy sequence sees clean positions before i and itself; the clean sequence sees itself as ever. The
stem runs on both as examples of one batch, so that positions are counted once; between the stem and the readout they
lie one behind the other. What a layer may see is read off the mask that it was given for the clean sequence alone,
which keeps windows, padding and biases that go by index as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dbconvert.anatomy import Axes, Path, SideAxes
from dbconvert.errors import DBConvertError
from dbconvert.graph.attention import ATTENTION, Attending, attend
from dbconvert.graph.functions import uncounted
from dbconvert.plan import Kernel


class TwoStreams:
    """What happens to one forward pass on a batch of 2N examples, N clean ones and then N noisy ones.

    Args:
        length: positions S of one sequence.
        axes: of the stream.
        sides: what the layers receive beside the stream, by argument.
        together: [N, S, S] bool, which positions belong to one document; None when all do.
        kernel: what computes attention.
    """

    def __init__(
        self,
        length: int,
        axes: Axes,
        sides: Mapping[Path, SideAxes],
        together: Tensor | None = None,
        kernel: Kernel = "auto",
    ) -> None:
        self.length, self.axes, self.sides, self.together, self.kernel = length, axes, sides, together, kernel
        self.sequence = positions_axis(axes)
        self.masks: dict[object, tuple[Tensor, Tensor]] = {}
        self.same = 0
        self.instead: Callable[[], TorchFunctionMode] | None = None
        """What a layer attends in while it runs in another way."""

    def leading(self) -> int:
        """How many groups of the condition, those of the clean sequence, are the same in all examples."""
        return self.same

    def enter(self, stream: Tensor) -> Tensor:
        """[2N, S, d] -> [N, 2S, d]."""
        return torch.cat(stream.chunk(2, self.axes.batch), self.sequence)

    def leave(self, stream: Tensor) -> Tensor:
        """[N, 2S, d], or the noisy [N, S, d] where the last layer gave only that -> the noisy [N, S, d]."""
        return stream.narrow(self.sequence, stream.shape[self.sequence] - self.length, self.length)

    def beside(self, path: Path, value: Tensor) -> Tensor:
        """A side input of 2N sequences of S positions as one of N sequences of 2S.

        Raises:
            DBConvertError: the analysis has not seen this argument.
        """
        known = known_side(self.sides, path, value)
        clean = self.beside_clean(path, value)
        if len(known.sequence) == 1:
            return torch.cat([clean, clean], known.sequence[0])
        return self.mask(clean, made_of=value) if known.sequence else clean

    def beside_clean(self, path: Path, value: Tensor) -> Tensor:
        """A side input of 2N sequences as one of N sequences of S positions.

        Raises:
            DBConvertError: the analysis has not seen this argument.
        """
        known = known_side(self.sides, path, value)
        return value if known.batch is None else value.chunk(2, known.batch)[0]

    def attention(self, _: object) -> TorchFunctionMode:
        return _Attention(self) if self.instead is None else self.instead()

    def mask(self, given: Tensor, made_of: Tensor, *, noisy: bool = False) -> Tensor:
        """The mask of both sequences from that of one, [..., S, S]; one a pass for all that are made of one tensor.

        Args:
            noisy: the rows of noisy positions alone, [..., S, 2S].
        """
        key = id(made_of), noisy
        if key not in self.masks:
            make = noisy_rows if noisy else two_stream_mask
            self.masks[key] = made_of, make(given, self.together)  # kept alive: its id is the key
        return self.masks[key][1]

    def mask_for(self, call: dict[str, Any], *, noisy: bool = False) -> Tensor:
        """The mask of both sequences for a call of attention, by its arguments; `noisy` as for `mask`."""
        query, mask = call["query"], call.get("attn_mask")
        if mask is not None:
            clean = mask.chunk(2)[0] if mask.shape[0] == 2 * query.shape[0] else mask
            # One made of both sequences by index, or by `beside` already, holds that of the clean one in its corner.
            return self.mask(clean[..., : self.length, : self.length], made_of=mask, noisy=noisy)
        causal = bool(call.get("is_causal"))
        if self.together is None:
            return lasting(self.length, query.device, causal=causal, noisy=noisy)
        seen = visible(self.length, query.device, causal=causal)
        return self.mask(seen.view((1,) * (query.dim() - 2) + seen.shape), made_of=seen, noisy=noisy)


class _Attention(Attending):
    """Gives attention over both sequences the mask for it."""

    def __init__(self, streams: TwoStreams) -> None:
        super().__init__()
        self.streams = streams

    def attend(self, given: dict[str, Any]) -> Tensor:
        streams = self.streams
        if not given["query"].shape[-2] == given["key"].shape[-2] == 2 * streams.length:
            return ATTENTION(**given)
        with uncounted():
            mask = streams.mask_for(given)
        return attend(given, mask, streams.kernel)


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


def as_stream(values: Tensor, axes: Axes) -> Tensor:
    """[N, P, d] with its axes where the stream's are; [N, d] as it is."""
    if values.dim() == 2:
        return values
    order = [0 if i == axes.batch else 2 if i == axes.channel + 3 else 1 for i in range(3)]
    return values.permute(order)


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
    given, others = limits(given, together)
    clean = given if others is None else torch.where(others, given, hidden(given))
    return torch.cat([torch.cat([clean, torch.full_like(clean, hidden(given))], -1), noisy_rows(given, together)], -2)


def noisy_rows(given: Tensor, together: Tensor | None = None) -> Tensor:
    """What noisy positions see of both sequences, [..., S, 2S]; arguments as of `two_stream_mask`."""
    given, others = limits(given, together)
    length = given.shape[-1]
    before = torch.ones(length, length, dtype=torch.bool, device=given.device).tril(-1)
    before = before if others is None else before & others
    itself = torch.eye(length, dtype=torch.bool, device=given.device)
    own = itself if given.dtype == torch.bool else given.diagonal(dim1=-2, dim2=-1).diag_embed()
    seen = torch.where(before, given, hidden(given))
    return torch.cat([seen, torch.where(itself, own, hidden(given)).expand(seen.shape)], -1)


@lru_cache(maxsize=16)
def visible(length: int, device: torch.device, *, causal: bool) -> Tensor:
    """What a position sees when nothing else is said, [S, S] bool; the same tensor every time."""
    whole = torch.ones(length, length, dtype=torch.bool, device=device)
    return whole.tril() if causal else whole


@lru_cache(maxsize=16)
def lasting(length: int, device: torch.device, *, causal: bool, noisy: bool) -> Tensor:
    """The mask of both sequences then, [2S, 2S], or of the noisy one, [S, 2S]; the same tensor every time."""
    seen = visible(length, device, causal=causal)
    return noisy_rows(seen) if noisy else two_stream_mask(seen)


def limits(given: Tensor, together: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A mask, and what documents leave of it, of one shape."""
    if together is None:
        return given, None
    length = given.shape[-1]
    others = together.view((len(together), *[1] * max(given.dim() - 3, 0), length, length))
    return given.expand(torch.broadcast_shapes(given.shape, others.shape)), others  # type: ignore[no-untyped-call]


def hidden(mask: Tensor) -> float | bool:
    """What hides a position in a mask of this kind."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
