"""What a job really has on the device in an update, found by looking: parameters, gradients, optimiser state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from dbconvert.engine.method import Job

SPARE = "spare"
"""Parameters that are there and that this form of training has no use for."""


def held(job: Job) -> dict[str, int]:
    """Bytes of unique storages after the optimiser's step, before gradients are freed.

    A baseline runs on a network that was converted: what conversion added, and layers that it does not run, are told
    apart as `spare`. Blocks that are away do not count. Where gradients are used and freed one by one, the
    largest counts.
    """
    seen: set[int] = set()
    storages(() if job.mover is None else job.mover.away(), seen)
    parameters = storages(job.method.held(job.network), seen)
    spare = storages(job.network.parameters(), seen)
    learning = [p for unit in job.all_units() for p in unit.parameters.values()]
    gradients = storages((p.grad for p in learning if p.grad is not None), seen)
    if not gradients and job.recipe.optimizer.in_backward:
        gradients = max(p.numel() * p.element_size() for p in learning if p.requires_grad)
    optimizer = storages((t for unit in job.all_units() for t in state_tensors(unit.optimizer.state.values())), seen)
    return {"parameters": parameters, "gradients": gradients, "optimizer": optimizer, SPARE: spare}


def storages(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the tensors' storages that were not seen before."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def state_tensors(states: Iterable[object]) -> Iterator[Tensor]:
    """All plain tensors of an optimiser's state; 8-bit state is made of several."""
    for state in states:
        if isinstance(state, dict):
            yield from state_tensors(state.values())
        elif hasattr(state, "__tensor_flatten__"):
            yield from state_tensors(getattr(state, name) for name in state.__tensor_flatten__()[0])
        elif isinstance(state, Tensor):
            yield state
