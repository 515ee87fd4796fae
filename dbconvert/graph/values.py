"""Reading and replacing values in the arguments and outputs of a call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from dbconvert.anatomy import Anatomy, BranchPart, Input, Layer, Path


def look_up(args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> Any:
    """The value at `path` among a call's arguments: its first step is a position or a keyword."""
    value: Any = args[path[0]] if isinstance(path[0], int) else kwargs[path[0]]
    return item(value, path[1:])


def put_in(args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, value: Any) -> tuple[Any, dict[str, Any]]:
    """The same arguments with `value` at `path`."""
    key = path[0]
    if isinstance(key, int):
        changed = replaced(args[key], path[1:], value)
        return (*args[:key], changed, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: replaced(kwargs[key], path[1:], value)}


def item(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def replaced(value: Any, path: Path, new: Any) -> Any:
    """`value` with the item at `path` replaced; containers are copied, not changed."""
    if not path:
        return new
    if isinstance(value, dict):
        return {**value, path[0]: replaced(value[path[0]], path[1:], new)}
    items = list(value)
    items[path[0]] = replaced(items[path[0]], path[1:], new)  # type: ignore[index]
    return items if isinstance(value, list) else tuple(items)


def imitate(layer: Layer | BranchPart, stream: Tensor, second: Tensor | None = None) -> Any:
    """What a layer would return if it did nothing: its streams in their places, None in all others."""
    kind, _, rest = layer.form.partition(":")
    if kind == "tensor":
        return stream
    handed: dict[Any, Tensor | None] = {layer.stream_out[0]: stream}
    if isinstance(layer, Layer) and layer.second_out:
        handed[layer.second_out[0]] = second
    if kind == "dict":
        return {name: handed.get(name) for name in rest.split(",")}
    items = [handed.get(i) for i in range(int(rest))]
    return items if kind == "list" else tuple(items)


def example_shape(given: Input) -> tuple[int, ...]:
    """The shape of what one example gives."""
    return given.shape if given.shared else given.shape[1:]


def as_taken(inputs: dict[str, Tensor], known: Iterable[Input]) -> dict[str, Tensor]:
    """Arguments with a row an example, as the network takes them: of what all examples share, one row."""
    axes = {given.name: len(given.shape) for given in known if given.shared}
    return {name: v[0] if name in axes and v.dim() > axes[name] else v for name, v in inputs.items()}


def joined(anatomy: Anatomy) -> bool:
    """Whether the first layers carry two streams that are one for the others."""
    return bool(anatomy.layers[0].second_in) and not anatomy.layers[-1].second_in
