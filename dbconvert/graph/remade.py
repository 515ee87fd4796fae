"""Conditioned values that autograd does not keep: they are made again when the backward pass asks for them.

A norm reads the stream, and what it gives is modulated: both values are small steps from a stream that is kept anyway.
Autograd keeps a stand-in for them, as activation checkpointing does for whole layers, at the price of running the norm
and the modulation once more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Pack = Callable[[Tensor], Any]
Make = Callable[[Tensor, Tensor, Tensor], Tensor]


class StandIn:
    """A value that can be made again.

    Args:
        make: makes it, from `kept`.
        kept: what is kept for it.
    """

    def __init__(self, make: Callable[[], Tensor], kept: tuple[Tensor, ...]) -> None:
        self.make, self.kept = make, kept
        self.left = 0
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """The value, which is held until all who keep it have taken it."""
        value = self.make() if self.value is None else self.value
        self.left -= 1
        self.value = value if self.left > 0 else None
        return value


class Remaking:
    """What is kept of one layer's run: the values that stand-ins are known for, while they are there.

    Args:
        count: is told of what stand-ins keep, and of all other tensors, when memory is counted.
    """

    def __init__(self, count: Pack | None) -> None:
        self.count = count
        self.known: dict[int, tuple[weakref.ref[Tensor], int, StandIn]] = {}

    def know(self, value: Tensor, stand_in: StandIn) -> None:
        self.known[value.untyped_storage()._cdata] = weakref.ref(value), value._version, stand_in

    def stand_in(self, tensor: Tensor) -> StandIn | None:
        """Of a tensor, or of what it is a view of; not of one that was written to since."""
        place, version, found = self.known.get(tensor.untyped_storage()._cdata, (None, 0, None))
        value = None if place is None else place()
        # A value that is gone may have left its storage's id to another.
        if found is None or value is None or tensor._version != version or tensor.dtype != value.dtype:
            return None
        return found

    def pack(self, tensor: Tensor) -> Any:
        found = self.stand_in(tensor)
        if found is None:
            # Detached: a node that keeps its own result would keep itself.
            return tensor.detach() if self.count is None else self.count(tensor), tensor._version
        found.left += 1
        if self.count is not None:
            for kept in found.kept:
                self.count(kept)
        return found, tensor.shape, tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        found, *layout = packed
        if isinstance(found, Tensor):
            if found._version != layout[0]:
                raise RuntimeError(f"a tensor {list(found.shape)} that the backward pass needs was changed in place")
            return found
        value: Tensor = found.take()
        same = [value.shape, value.stride(), value.storage_offset()] == layout
        return value if same else value.as_strided(*layout)


_active: list[Remaking] = []
_counting: list[Pack] = []


@contextmanager
def remaking(within: AbstractContextManager[Any]) -> Iterator[None]:
    """Meanwhile autograd keeps stand-ins of conditioned values; not where something else says what it keeps."""
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    count = _counting[-1] if _counting else None
    if not torch.is_grad_enabled() or (outer is not None and outer[0] is not count):
        with within:
            yield
        return
    made = Remaking(count)
    _active.append(made)
    try:
        with torch.autograd.graph.saved_tensors_hooks(made.pack, made.unpack), within:
            yield
    finally:
        _active.pop()


@contextmanager
def counted_by(pack: Pack) -> Iterator[None]:
    """Meanwhile `pack`, the hook of saved tensors in force, is told of all that is kept."""
    _counting.append(pack)
    try:
        yield
    finally:
        _counting.pop()


def remade(make: Make, value: Tensor, shift: Tensor, scale: Tensor, again: StandIn | None) -> Tensor:
    """`make(value, shift, scale)`; autograd does not keep it, nor the value where that can be made again.

    Args:
        again: makes the value.
    """
    active = _active[-1] if _active and torch.is_grad_enabled() else None
    if active is not None and again is not None:
        active.know(value, again)
    out = make(value, shift, scale)
    if active is not None:
        # Rows are views of all that a layer's modulation gave.
        rows = shift.detach().clone(), scale.detach().clone()
        active.know(out, from_value(value.detach(), rows, make) if again is None else from_stream(again, rows, make))
    return out


def from_value(value: Tensor, rows: tuple[Tensor, Tensor], make: Make) -> StandIn:
    return StandIn(lambda: _plainly(make, value, *rows), (value, *rows))


def from_stream(again: StandIn, rows: tuple[Tensor, Tensor], make: Make) -> StandIn:
    again.left += 1
    return StandIn(lambda: _plainly(make, again.take(), *rows), (*again.kept, *rows))


@torch.no_grad()
def _plainly(make: Make, value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return make(value, shift, scale)


def run_again(module: nn.Module, forward: Callable[[Tensor], Tensor], entered: tuple[Any, ...]) -> StandIn | None:
    """Makes what a module gave of one tensor; None for one whose run is not a function of that and its parameters.

    Parameters are those of now: in a functional call they are no longer there later.
    """
    if not _active or len(entered) != 1 or not isinstance(entered[0], Tensor):
        return None
    if module._buffers or module._modules:
        return None
    stream, own = entered[0].detach(), dict(module._parameters)
    device = stream.device.type
    cast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    @torch.no_grad()
    def make() -> Tensor:
        now, module._parameters = module._parameters, own
        try:
            with torch.autocast(device, cast[1], enabled=cast[0], cache_enabled=False):
                return forward(stream)
        finally:
            module._parameters = now

    return StandIn(make, (stream,))
