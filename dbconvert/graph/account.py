"""What a piece of training holds in memory: parameters, gradients, optimiser state, and what autograd saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.graph.remade import counted_by
from dbconvert.graph.tape import tensors
from dbconvert.graph.values import replaced


def saved_bytes(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of `loss()`, parameters excluded.

    There is no going back through `loss()` then. Works on real, fake and meta tensors. Storages are counted once,
    however many tensors share them.
    """
    owned = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            # The tensor keeps the storage, and so its id, alive. Handing it to autograd too would tie both into a knot
            # that nothing ever frees.
            kept[storage._cdata] = (storage.nbytes(), tensor)

    with counted_by(pack), torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):  # type: ignore[arg-type, return-value]
        result = loss()
    total = sum(size for size, _ in kept.values())
    kept.clear()
    del result
    return total


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters}.values())


@contextmanager
def only_inputs_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Autograd keeps of each module's call what enters it, as activation checkpointing does; for counting only."""
    changed = list(modules)
    for module in changed:
        module.forward = partial(_call_kept, module, module.forward)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _call_kept(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    entering = [tensor for _, tensor in [*tensors(args), *tensors(kwargs)]]
    returned: list[Any] = []

    def run() -> tuple[Tensor, ...]:
        returned.append(forward(*args, **kwargs))
        return tuple(tensor for _, tensor in tensors(returned[0]))

    made = _Kept.apply(run, len(entering), *entering, *module.parameters())  # type: ignore[no-untyped-call]
    out = returned[0]
    for (path, _), tensor in zip(tensors(out), made, strict=True):
        out = replaced(out, path, tensor)
    return out


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[], tuple[Tensor, ...]], count: int, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*given[:count])
        return run()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("this pass counts what is kept, and keeps nothing to go back with")
