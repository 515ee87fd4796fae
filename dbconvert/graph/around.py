"""Layers that are never called: pairs of modules in nested lists, with the additions in the loop around them."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import fx, nn

from dbconvert.anatomy import Around, Axes, Branch, BranchPart, GateSite, Layer, NormSite, Path
from dbconvert.errors import Refused
from dbconvert.graph import ops, sites
from dbconvert.graph.evidence import Evidence
from dbconvert.graph.layers import refuse_layer_made
from dbconvert.graph.parts import lies_in, weights_of
from dbconvert.graph.spine import ResidualAdd
from dbconvert.graph.stack import Stack
from dbconvert.graph.tape import ModuleCall, describe

Site = TypeVar("Site", NormSite, GateSite)


def is_around(stack: Stack, evidence: Evidence) -> bool:
    """Whether no layer of a stack is called, though modules inside of all are."""
    return not any(evidence.recording.calls_of(path) for path, _ in stack.layers)


def part_calls(stack: Stack, evidence: Evidence) -> list[list[ModuleCall]]:
    """For each layer the calls that compute its branches, one an addition.

    Raises:
        Refused: a branch is more than the result of one module of the layer, added directly to the stream.
    """
    loops = {add.node.meta["calls"][-1] for _, additions in stack.layers for add in additions}
    return [[part_call(path, add, loops, evidence) for add in additions] for path, additions in stack.layers]


def part_call(path: str, add: ResidualAdd, loops: set[int], evidence: Evidence) -> ModuleCall:
    inside = [scope for scope in add.node.meta["scope"] if lies_in(scope, [path])]
    if inside and isinstance(evidence.model.get_submodule(path), nn.ModuleList | nn.ModuleDict):
        raise Refused(
            f"{path} is a list of modules that the network calls one by one, and one of them, {inside[-1]}, adds",
            node=describe(add.node),
            kind="functional",
            hint="make each layer one module whose forward contains its norm, its branch and its addition",
        )
    if inside:
        raise Refused(
            f"{path} never runs as a module, though its parts do: something calls its forward directly",
            node=describe(add.node),
            kind="functional",
            hint="call the layer itself, layer(x) and not layer.forward(x)",
        )
    operands = ops.operands(add.node)
    plain = len(loops) == 1 and len(add.branches) == 1 and not add.on_spine and add.branches[0] in operands
    returned = [
        call
        for call, where in evidence.exits.get(add.branches[0], ())
        if lies_in(call.path, [path]) and call.parents[-1:] == tuple(loops) and len(where) <= 1
    ]
    if not plain or not returned or list(add.branches[0].users) != [add.node] or not alone(returned[0], add, evidence):
        raise Refused(
            f"the residual addition of {path} is written outside of it, and adds more than one of its modules returns",
            node=describe(add.node),
            kind="functional",
            hint="make each layer one module whose forward contains its additions",
        )
    return returned[0]


def alone(call: ModuleCall, add: ResidualAdd, evidence: Evidence) -> bool:
    """Whether a branch is computed inside one module call, which runs once and takes the stream itself."""
    inside = evidence.spines.reach.between(add.source, add.branches)
    own = all(
        call.order in node.meta["calls"] or node.target == call.path or ops.unchanged(node) is not None
        for node in inside
        if node is not add.branches[0]
    )
    return own and len(evidence.recording.calls_of(call.path)) == 1 and stream_in(call, add, evidence) is not None


def stream_in(call: ModuleCall, add: ResidualAdd, evidence: Evidence) -> Path | None:
    found = [path for path, node in call.inputs if evidence.spines.look_through(node)[0] is add.source]
    return found[0] if found else None


def around_layers(
    stack: Stack, calls: list[list[ModuleCall]], evidence: Evidence, axes: Axes, width: int, outside: tuple[str, ...]
) -> tuple[Layer, ...]:
    """The facts of every layer of a stack whose additions are written around its modules."""
    everyone = [call for own in calls for call in own]
    layers = []
    for (path, additions), own in zip(stack.layers, calls, strict=True):
        for call in own:
            for argument, node in call.inputs:
                refuse_layer_made(call, argument, node, [other for other in everyone if other not in own])
        branches = [branch(path, add, call, evidence, axes, width) for add, call in zip(additions, own, strict=True)]
        layers.append(
            Layer(
                path=path,
                stream_in=(0,),
                stream_out=(),
                form="tensor",
                branches=tuple(branches),
                on_spine=(),
                side_inputs=(),
                **weights_of(path, evidence.model, outside),
                around=Around(
                    additions[0].node.meta["scope"][-1],
                    tuple(part(call, add, evidence) for call, add in zip(own, additions, strict=True)),
                ),
            )
        )
    return tuple(layers)


def part(call: ModuleCall, add: ResidualAdd, evidence: Evidence) -> BranchPart:
    entering = stream_in(call, add, evidence)
    assert entering is not None
    leaving = next(path for path, node in call.outputs if node is add.branches[0])
    return BranchPart(call.path, entering, leaving, call.form)


def branch(path: str, add: ResidualAdd, call: ModuleCall, evidence: Evidence, axes: Axes, width: int) -> Branch:
    """A branch's sites: inside its module, else on the module's own input and output."""
    rank = len(add.node.meta["shape"])
    run = sites.LayerRun(call, (add,), (), rank, axes.channel + rank, width)
    inner = call.path[len(path) + 1 :]
    try:
        (found,) = sites.branches(run, evidence)
    except Refused:
        own = part(call, add, evidence)
        norm = NormSite(add.source.name, "", width, axes, (own.stream_in,))
        found = Branch(add.node.name, "input", norm, GateSite(add.branches[0].name, "", width, axes, own.stream_out))
    return replace(found, norm=below(found.norm, inner), gate=below(found.gate, inner))


def below(site: Site, inner: str) -> Site:
    """A site inside a module of the layer, as a site of the layer."""
    return replace(site, module=f"{inner}.{site.module}".rstrip("."))


def stream_before(add: ResidualAdd) -> fx.Node:
    """The stream as an addition takes it."""
    return next(operand for operand in ops.operands(add.node) if operand is not add.branches[0])
