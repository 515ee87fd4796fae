"""Streams that lie side by side in one tensor for a while: what part of a concatenation a slice of it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from dbconvert.graph import ops

JOINS = {"cat", "concat", "concatenate"}
CUTS = {"getitem", "narrow"}
SPLITS = {"split", "split_with_sizes", "chunk", "tensor_split"}


@dataclass(frozen=True)
class Piece:
    """The entries from `start` on, `length` of them, along one axis of a tensor."""

    whole: fx.Node
    axis: int
    start: int
    length: int


def piece(node: fx.Node) -> Piece | None:
    """The part of a tensor that a slice, or an item of a split, is; None for all other nodes.

    Slices are cut again out of a tensor that counts along the axis: no knowledge of their arguments is needed.
    """
    made, whole = ops.first(node), cut_from(node)
    if made is None or whole is None:
        return None
    before, after = whole.meta["shape"], node.meta.get("shape") or ()
    axes = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    if len(before) != len(after) or len(axes) != 1:
        return None
    counted = cut_again([node] if made is whole else [made, node], ops.counting(before, axes[0]))
    line = ops.counting(after, axes[0])
    if counted is None or counted.shape != line.shape or not counted.numel():
        return None
    start = int(counted.flatten()[0])
    return Piece(whole, axes[0], start, after[axes[0]]) if torch.equal(counted, line + start) else None


def cut_from(node: fx.Node) -> fx.Node | None:
    """The tensor that a slice, or an item of a split, is cut from; None for all other nodes."""
    made = ops.first(node) if ops.function_name(node) in CUTS else None
    whole = ops.first(made) if made is not None and ops.function_name(made) in SPLITS else made
    return None if whole is None or whole.meta.get("shape") is None else whole


def cut_again(nodes: list[fx.Node], value: torch.Tensor) -> torch.Tensor | None:
    """What slices and splits, one after the other, leave of another tensor; None where they also depend on tensors."""
    found = value
    for node in nodes:
        if len(node.all_input_nodes) != 1:
            return None
        try:
            found = node.target(found, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        except (TypeError, IndexError, RuntimeError):  # an index that the recording could not hold
            return None
    return found if isinstance(found, torch.Tensor) else None


def joined_at(join: fx.Node, cut: Piece) -> fx.Node | None:
    """The tensor that lies where `cut` does in a concatenation; None if none lies just there."""
    axis, start = joined_along(join), 0
    if axis != cut.axis:
        return None
    for part in joined_parts(join):
        if start == cut.start and part.meta["shape"][axis] == cut.length:
            return part
        start += part.meta["shape"][axis]
    return None


def joined_along(join: fx.Node) -> int | None:
    """The axis of a concatenation; None for all other nodes."""
    if ops.function_name(join) not in JOINS:
        return None
    axis = join.kwargs.get("dim", join.args[1] if len(join.args) > 1 else 0)
    whole = all(part.meta.get("shape") for part in joined_parts(join))
    return axis % len(join.meta["shape"]) if isinstance(axis, int) and whole else None


def joined_parts(join: fx.Node) -> list[fx.Node]:
    given = join.kwargs.get("tensors", join.args[0] if join.args else ())
    return [part for part in given if isinstance(part, fx.Node)] if isinstance(given, tuple | list) else []
