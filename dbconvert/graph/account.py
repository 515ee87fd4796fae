"""What a piece of training holds in memory: parameters, gradients, optimiser state, and what autograd saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def saved_bytes(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of `loss()`, parameters excluded.

    Works on real, fake and meta tensors. Storages are counted once, however many tensors share them.
    """
    owned = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = (
                storage.nbytes(),
                tensor,
            )  # the tensor keeps the storage, and so its id, alive
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    total = sum(size for size, _ in kept.values())
    del result
    return total


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters}.values())


def state_bytes(parameters: Iterable[nn.Parameter], moments: int) -> int:
    """Parameters, their gradients and `moments` optimiser tensors of the same size."""
    return (2 + moments) * parameter_bytes(parameters)
