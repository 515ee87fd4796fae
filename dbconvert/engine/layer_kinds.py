"""Which layers of a stack are alike, so that one measurement stands for all of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from dbconvert.anatomy import Anatomy

Facts = dict[tuple[str, str], Any]
"""Of a layer: by (path of a module in it, name of a fact)."""


def layer_kinds(model: nn.Module, anatomy: Anatomy) -> tuple[int, ...]:
    """A number for each layer: the same one for layers of the same modules, shapes and settings.

    What is each layer's own index does not count: layers often know which one they are.
    """
    found = [facts(model.get_submodule(layer.path)) for layer in anatomy.layers]
    numbers = {key for key in found[0] if all(is_index(layer.get(key), i) for i, layer in enumerate(found))}
    seen: dict[Any, int] = {}
    prints = (frozenset((k, v) for k, v in layer.items() if k not in numbers) for layer in found)
    return tuple(seen.setdefault(each, len(seen)) for each in prints)


def facts(layer: nn.Module) -> Facts:
    found: Facts = {}
    for path, module in layer.named_modules():
        found[path, "class"] = type(module)
        found.update({(path, n): tuple(p.shape) for n, p in module.named_parameters(recurse=False)})
        found.update({(path, name): value for name, value in vars(module).items() if is_setting(name, value)})
    return found


def is_setting(name: str, value: Any) -> bool:
    return isinstance(value, int | float | str | None) and not name.startswith("db_")


def is_index(value: Any, index: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == index
