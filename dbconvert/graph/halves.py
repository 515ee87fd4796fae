"""The last layer of a block on [clean ; noisy]: its clean half is not read, so only keys and values are computed.

The layer runs twice: on the clean positions up to its attention, which takes their keys and values and ends that run,
and then on the noisy ones, which attend to both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dbconvert.anatomy import Path
from dbconvert.errors import DBConvertError
from dbconvert.graph.attention import ATTENTION, Attending, attend
from dbconvert.graph.functions import uncounted
from dbconvert.graph.tape import argument_leaves
from dbconvert.graph.two_streams import TwoStreams
from dbconvert.graph.values import look_up, put_in

Given = tuple[tuple[Any, ...], dict[str, Any]]


class LastLayer:
    """Runs one layer of a forward pass on [clean ; noisy] and gives the noisy half.

    Args:
        streams: what the other layers of the pass do.
    """

    def __init__(self, streams: TwoStreams) -> None:
        self.streams = streams
        self.clean: tuple[Tensor, Tensor] | None = None
        self.calls = 0

    def __call__(self, call: Callable[..., Any], stream: Path, *args: Any, **kwargs: Any) -> Any:
        """What `call` gives for the noisy positions.

        Args:
            call: the layer; it takes the conditioning as its last positional argument.
            stream: the argument that carries the stream [N, 2S, d].
            args, kwargs: the layer's; the conditioning is [N, 2, width] or [N, 2S, width], the clean half first.

        Raises:
            DBConvertError: the layer does not attend exactly once where keys and values can be met.
        """
        *args, condition = args  # type: ignore[assignment]
        clean, noisy = look_up(args, kwargs, stream).chunk(2, self.streams.sequence)
        for_clean, for_noisy = condition.chunk(2, 1)
        args, kwargs = self.beside(stream, args, kwargs)
        self.clean, self.calls = None, 0
        self.streams.instead, same = self.attention, self.streams.same
        try:
            self.clean = keys_of(call, *put_in(args, kwargs, stream, clean), for_clean)
            args, kwargs = put_in(args, kwargs, stream, noisy)
            self.streams.same = 0
            out = call(*args, for_noisy, **kwargs)
        finally:
            self.streams.instead, self.streams.same = None, same
        if self.calls != 1:
            raise DBConvertError("a layer does not attend exactly once in torch's attention")
        return out

    def beside(self, stream: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        """Arguments of 2N sequences as those of N."""
        for path, value in argument_leaves(args, kwargs):
            if isinstance(value, Tensor) and path != stream:
                args, kwargs = put_in(args, kwargs, path, self.streams.beside_clean(path, value))
        return args, kwargs

    def attention(self) -> TorchFunctionMode:
        """What the layer attends in, for either run."""
        return _UpToKeys(self.streams.length) if self.clean is None else _OverBoth(self, self.clean)


def keys_of(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], condition: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Keys and values of the first attention that a layer comes to; None if it comes to none."""
    try:
        call(*args, condition, **kwargs)
    except _Met as met:
        return met.keys, met.values
    return None


class _Met(Exception):
    """Ends the run on clean positions: keys and values are there."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class _UpToKeys(Attending):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def attend(self, given: dict[str, Any]) -> Tensor:
        if given["query"].shape[-2] == given["key"].shape[-2] == self.length:
            raise _Met(given["key"], given["value"])
        return ATTENTION(**given)


class _OverBoth(Attending):
    def __init__(self, layer: LastLayer, clean: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.layer, self.clean = layer, clean

    def attend(self, given: dict[str, Any]) -> Tensor:
        streams = self.layer.streams
        if given["query"].shape[-2] != streams.length or given["key"].shape[-2] != streams.length:
            return ATTENTION(**given)
        self.layer.calls += 1
        with uncounted():
            mask = streams.mask_for(given, noisy=True)
            given["key"] = torch.cat([self.clean[0], given["key"]], -2)
            given["value"] = torch.cat([self.clean[1], given["value"]], -2)
        return attend(given, mask, streams.kernel)
