"""Refusals of networks that carry more than one stream: loops that feed each other, streams that matrices mix."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

from torch import fx

from dbconvert.errors import Refused
from dbconvert.graph import ops
from dbconvert.graph.evidence import Evidence
from dbconvert.graph.tape import ModuleCall, describe

PRODUCTS = ("matmul", "bmm", "rmatmul")


def feeding_loops(evidence: Evidence) -> Refused | None:
    """Modules that run again and again, each on what it returned before and on what the other one did."""
    fed: dict[str, dict[str, fx.Node]] = defaultdict(dict)
    for call in evidence.recording.calls:
        for _, node in call.inputs:
            for maker in filter(None, (returned_by(term, evidence) for term in terms(node))):
                fed[call.path].setdefault(maker, node)
    for one, other in combinations([path for path, makers in fed.items() if path in makers], 2):
        if other in fed[one] and one in fed[other]:
            return Refused(
                f"{loop(one, evidence)} and {loop(other, evidence)} are looped and feed each other: each takes what "
                "both of them returned, so that there is no single stream to cut",
                node=describe(fed[one][other]),
                kind="looped",
                hint="only layers that follow each other on one stream can be cut",
            )
    return None


def terms(node: fx.Node) -> list[fx.Node]:
    """What a value is the plain sum of; else the value itself."""
    made = ops.origin(node)
    return [ops.origin(term) for term in ops.operands(made)] if ops.is_addition(made) else [made]


def returned_by(node: fx.Node, evidence: Evidence) -> str:
    """The outermost module that returned a value; empty if none did."""
    calls = [call for call, _ in evidence.exits.get(node, ())]
    return min(calls, key=lambda call: len(call.parents)).path if calls else ""


def loop(path: str, evidence: Evidence) -> str:
    """A looped module as it is named to people: with its layers, if it calls numbered modules of one class."""
    calls = evidence.recording.calls
    runs = evidence.recording.calls_of(path)
    inside = {c.path for c in calls if runs[0].order in c.parents[-1:] and c.path.rpartition(".")[2].isdigit()}
    classes = {type(evidence.model.get_submodule(inner)) for inner in inside}
    layers = f"{len(inside)} layers, " if len(inside) > 1 and len(classes) == 1 else ""
    return f"{path} ({layers}called {len(runs)} times)"


def mixed_streams(calls: list[ModuleCall], stream: tuple[fx.Node, fx.Node], evidence: Evidence) -> Refused | None:
    """Layers that keep [.., n, .., d], compute branches for [.., d], and add these to the product of the n streams with
    an n x n matrix.

    Args:
        stream: what carries the streams into the first layer and out of it.
    """
    entering, leaving = stream
    shape = entering.meta["shape"]
    between = evidence.spines.reach.between(entering, [leaving])
    sums = [node for node in between if ops.is_addition(node) and node not in evidence.spines.adds]
    for node in (term for total in sums for term in terms(total)):
        axis = mixed_axis(node, entering)
        if axis is None or not works_on(calls[0], (*shape[:axis], *shape[axis + 1 :]), evidence):
            continue
        n = shape[axis]
        return Refused(
            f"the layers carry {n} streams, {list(shape)}, and {calls[0].path} multiplies them by {n} x {n} matrices: "
            "they are mixed, not added to",
            node=describe(node),
            kind="several-streams",
            hint="name the layers yourself with adapter() in a model.py (docs/will-it-convert.md): each is then "
            "conditioned as a whole, on all its streams",
            facts={"stack": calls[0].path.rpartition(".")[0], "layers": len(calls), "streams": n},
        )
    return None


def mixed_axis(node: fx.Node, stream: fx.Node) -> int | None:
    """The axis of the stream, n long, along which a matrix product mixes it by matrices [.., n, n]; None if it is
    not such a product."""
    if ops.function_name(node) not in PRODUCTS or len(ops.operands(node)) < 2 or ops.size(node) != ops.size(stream):
        return None
    left, right = ops.operands(node)
    for operand, matrix, axis in ((right, left, -2), (left, right, -1)):
        rank, square = len(operand.meta["shape"]), matrix.meta["shape"][-2:]
        if rank > 2 and tuple(square) == (operand.meta["shape"][axis],) * 2:
            found = axis_of(operand, rank + axis, stream)
            if found is not None:
                return found
    return None


def axis_of(node: fx.Node, axis: int, stream: fx.Node) -> int | None:
    """Where an axis of a view of the stream lies in the stream; None if the node is no view of it."""
    found: int | None = axis
    while node is not stream and found is not None:
        before = ops.unchanged(node)
        if before is None:
            return None
        node, found = before, ops.axis_before(node, found)
    return found


def works_on(layer: ModuleCall, shape: tuple[int, ...], evidence: Evidence) -> bool:
    """Whether a module of the layer that has weights takes a tensor of this shape and returns one."""
    return any(
        layer.order in call.parents
        and shape in [node.meta["shape"] for _, node in call.inputs]
        and shape in [node.meta["shape"] for _, node in call.outputs]
        and any(p.dim() > 1 for p in evidence.model.get_submodule(call.path).parameters())
        for call in evidence.recording.calls
    )
