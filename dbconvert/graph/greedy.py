"""Layers that learn alone: what enters and what leaves each of them is met, so that no gradient passes between two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from dbconvert.anatomy import Anatomy, Layer
from dbconvert.graph.values import item, look_up, put_in

Enter = Callable[[int, Tensor], Tensor]
Leave = Callable[[int, Tensor], None]


@contextmanager
def layer_by_layer(model: nn.Module, anatomy: Anatomy, enter: Enter, leave: Leave) -> Iterator[None]:
    """Meanwhile `enter` changes the stream before every layer, and `leave` is given what the layer made of it.

    Args:
        model: whose layers are called as modules, each once.
    """
    hooks = []
    for index, layer in enumerate(anatomy.layers):
        module = model.get_submodule(layer.path)
        before, after = partial(_before, index, layer, enter), partial(_after, index, layer, leave)
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _before(
    index: int, layer: Layer, enter: Enter, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return put_in(args, kwargs, layer.stream_in, enter(index, look_up(args, kwargs, layer.stream_in)))


def _after(index: int, layer: Layer, leave: Leave, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    leave(index, item(out, layer.stream_out))
