"""Which of a network's blocks are on the device: only the one that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dbconvert.engine.network import BlockwiseNetwork

CPU = torch.device("cpu")


def put(network: BlockwiseNetwork, owner: int | None, device: torch.device) -> None:
    """Moves one block, or the periphery (None)."""
    for tensor in tensors_of(network, owner):
        tensor.data = tensor.data.to(device)


def tensors_of(network: BlockwiseNetwork, owner: int | None) -> list[Tensor]:
    """Parameters and buffers, those that are not saved included."""
    model = network.model
    everything = (*model.named_parameters(), *model.named_buffers())
    return [tensor for name, tensor in everything if network.owner(name) == owner]


@contextmanager
def on_device(network: BlockwiseNetwork, block: int | None, device: torch.device) -> Iterator[None]:
    """Meanwhile the periphery and a block are on the device; None brings all blocks."""
    owners = (None, *(network.present if block is None else (block,)))
    for owner in owners:
        put(network, owner, device)
    try:
        yield
    finally:
        for owner in owners if device != CPU else ():
            put(network, owner, CPU)
