"""Activation checkpointing: autograd keeps what enters a layer, and runs the layer again for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dbconvert.graph.tape import tensors
from dbconvert.graph.values import replaced


def recomputed(
    layer: nn.Module, call: Callable[..., Any], stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What `call(*args, **kwargs)` gives, with the same random numbers both times.

    Whatever steers the network has to be the same at the backward pass: it comes before the next forward pass.

    Args:
        layer: that `call` runs.
        stream: the argument that is kept even where nothing before it is trained.
    """
    given: Any = (args, kwargs)
    # Others, masks above all, stay the objects that they are: what is made of them is known by them.
    entering = [(path, value) for path, value in tensors(given) if value.requires_grad or value is stream]

    def run(*values: Tensor) -> Any:
        now = given
        for (path, _), value in zip(entering, values, strict=True):
            now = replaced(now, path, value)
        return call(*now[0], **now[1])

    return checkpoint(
        run,
        *(value for _, value in entering),
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), statistics_kept(layer)),
    )


@contextmanager
def statistics_kept(layer: nn.Module) -> Iterator[None]:
    """Running statistics are not brought up to date a second time."""
    norms = [module for module in layer.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, before, strict=True):
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
