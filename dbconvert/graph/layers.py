"""The boundary of each layer: what carries the stream in and out, what else enters, and what must not."""

from __future__ import annotations

from itertools import pairwise

from torch import fx

from dbconvert.anatomy import Layer, Path, SideInput
from dbconvert.errors import Refused
from dbconvert.graph import ops, sites
from dbconvert.graph.conditioned import conditioned_by
from dbconvert.graph.evidence import Evidence
from dbconvert.graph.parts import weights_of
from dbconvert.graph.spine import ResidualAdd
from dbconvert.graph.stack import Stack, call_of
from dbconvert.graph.tape import ModuleCall, describe

FORMS = ("tensor", "tuple", "list", "dict")
NO_SECOND: tuple[Path, Path] = ((), ())


def layer_calls(stack: Stack, evidence: Evidence) -> list[ModuleCall]:
    """The call of each layer, in order.

    Raises:
        Refused: a layer is never called, or its residual addition happens outside of its call.
    """
    found = []
    for path, additions in stack.layers:
        order = call_of(additions[0], path)
        if order is None:
            raise Refused(
                f"the residual addition of {path} is written outside of it, so that the layer cannot be run alone",
                node=describe(additions[0].node),
                kind="functional",
                hint="make each layer one module whose forward contains its additions",
            )
        found.append(evidence.recording.calls[order])
    return found


def read_layers(
    stack: Stack, evidence: Evidence, channel: int, width: int, outside: tuple[str, ...]
) -> tuple[Layer, ...]:
    """The facts of every layer of a stack, whose stream has `width` channels along the axis `channel`.

    Args:
        outside: parts of layers that belong to the periphery.

    Raises:
        Refused: with the node at fault, for anything that running a layer alone would break.
    """
    calls = layer_calls(stack, evidence)
    layers, previous = [], None
    firsts = [entry(call, own[0], evidence)[0] for call, (_, own) in zip(calls, stack.layers, strict=True)]
    seconds = second_streams(calls[: apart(stack, evidence)], firsts, stack.join)
    seconds += [NO_SECOND] * (len(calls) - len(seconds))
    for (path, additions), call, second in zip(stack.layers, calls, seconds, strict=True):
        stream_in, entering, first = entry(call, additions[0], evidence)
        stream_out, leaving, after_last = exit_(call, additions[-1], evidence)
        if previous is not None and not (stack.join is not None and ops.stays(stack.join, entering)):
            refuse_glue(previous, entering, path, evidence)
        previous = leaving
        rank = len(entering.meta["shape"])
        written = tuple(inner for add in additions for inner in add.written)
        run = sites.LayerRun(call, written, after_last, rank, channel, width)
        begins_with = (*first, *(node for node in additions[0].on_spine if call.order in node.meta["calls"]))
        conditioned = conditioned_by(run, evidence)
        second_in, second_out = second if conditioned else NO_SECOND
        beside = side_inputs(call, entering, calls, evidence, second_in)
        layers.append(
            Layer(
                path=path,
                stream_in=stream_in,
                stream_out=stream_out,
                form=call.form,
                branches=() if conditioned else sites.branches(run, evidence),
                on_spine=tuple(node.name for node in (*begins_with, *sites.on_spine(run))),
                side_inputs=beside,
                **weights_of(path, evidence.model, outside),
                conditioned_by=conditioned,
                second_in=second_in,
                second_out=second_out,
            )
        )
    return tuple(layers)


def apart(stack: Stack, evidence: Evidence) -> int:
    """How many layers there are before two streams become one; all where they do not."""
    join, reach = stack.join, evidence.spines.reach
    return sum(join is None or not reach.is_ancestor(join, own[0].node) for _, own in stack.layers)


def entry(call: ModuleCall, add: ResidualAdd, evidence: Evidence) -> tuple[Path, fx.Node, tuple[fx.Node, ...]]:
    """The argument that carries the stream into a layer, its node, and the norms and scalings that it begins with."""
    begin: fx.Node | None = add.source
    passed: list[fx.Node] = []
    while begin is not None:
        for path, node in call.inputs:
            if evidence.spines.look_through(node)[0] is begin and ops.size(node) == ops.size(add.node):
                return path, node, tuple(passed)
        before = evidence.spines.before(begin) if call.order in begin.meta["calls"] else None
        passed.append(begin)
        begin = None if before is None else ops.origin(before)
    raise Refused(
        f"the residual stream does not enter {call.path} as an argument",
        node=describe(add.node),
        kind="deferred-residual",
        hint="give each layer the full stream and let it return the sum",
    )


def exit_(call: ModuleCall, add: ResidualAdd, evidence: Evidence) -> tuple[Path, fx.Node, tuple[fx.Node, ...]]:
    """Where a layer's output holds the stream, its node, and the norms it passed since the last addition."""
    if call.form.partition(":")[0] not in FORMS:
        raise Refused(
            f"{call.path} returns a {call.form}, which a skipped layer cannot imitate",
            node=call.path,
            kind="output-form",
            hint="return a tensor, a tuple, a list or a dict",
        )
    for path, node in call.outputs:
        source, passed = evidence.spines.look_through(node)
        if source is add.node and len(path) <= 1:
            return path, node, passed
    raise Refused(
        f"{call.path} does not hand on the sum of its last residual addition",
        node=describe(add.node),
        kind="deferred-residual",
        hint="let each layer return the full stream",
    )


def read_outside(calls: list[ModuleCall], layers: tuple[Layer, ...], join: fx.Node | None = None) -> list[str]:
    """Layers, but for the last, whose stream is also used outside of all layers, as in a readout of several depths, but
    not where it becomes one with another.
    """
    orders = {call.order for call in calls}
    found = []
    for call, layer in zip(calls[:-1], layers, strict=False):
        waiting = [dict(call.outputs)[layer.stream_out]]
        for node in waiting:
            outside = [user for user in node.users if not orders & set(user.meta.get("calls", ()))]
            waiting.extend(user for user in outside if ops.unchanged(user) is node)
            others = [user for user in outside if user is not join and user.op != "output"]
            if any(ops.unchanged(user) is not node for user in others):
                found.append(layer.path)
    return list(dict.fromkeys(found))


def second_streams(calls: list[ModuleCall], firsts: list[Path], join: fx.Node | None) -> list[tuple[Path, Path]]:
    """Where a second stream, of one shape all along, enters and leaves every layer; it must end with the last one.

    Args:
        firsts: arguments that carry the first one.
        join: may use it after that.
    """
    for path, node in calls[0].inputs:
        found = handed_through(path, node, calls, firsts) if path != firsts[0] and ops.is_floating(node) else []
        end = dict(calls[-1].outputs).get(found[-1][1]) if found else None
        if found and (end is None or end.users.keys() <= {join}):
            return [*found[:-1], found[-1] if end is not None else (found[-1][0], ())]
    return [NO_SECOND] * len(calls)


def handed_through(path: Path, node: fx.Node, calls: list[ModuleCall], firsts: list[Path]) -> list[tuple[Path, Path]]:
    """Where what enters the first layer at `path` enters and leaves every layer, each of which makes it anew; empty if
    one does not. The last is taken to return it where the one before it does."""
    entering, found = path, []
    for (before, call), own in zip(pairwise(calls), firsts[1:], strict=False):
        made = {
            at: leaving
            for at, given in call.inputs
            if at != own and ops.same_shape(given, node) and before.order in given.meta["calls"]
            if (leaving := returned(before, given))
        }
        if not made:
            return []
        after = entering if entering in made else next(iter(made))
        found.append((entering, made[after]))
        entering = after
    return [*found, (entering, found[-1][1])] if found else []


def returned(call: ModuleCall, later: fx.Node) -> Path:
    """Where among others a call's output holds what is used later, as it is; empty if it does not."""
    return next((path for path, node in call.outputs if len(path) == 1 and ops.stays(node, later)), ())


def refuse_glue(leaving: fx.Node, entering: fx.Node, path: str, evidence: Evidence) -> None:
    """Between two layers the stream must stay as it is: skipped layers would repeat whatever happens there."""
    if ops.stays(leaving, entering):
        return
    raise Refused(
        f"the stream is changed before it enters {path}, outside of any layer",
        node=describe(entering),
        kind="glue",
        hint="move that computation into the layer",
    )


def side_inputs(
    call: ModuleCall, stream: fx.Node, calls: list[ModuleCall], evidence: Evidence, second: Path = ()
) -> tuple[SideInput, ...]:
    """Tensors that enter a layer beside the stream and a second one; none may come out of another layer."""
    found = []
    for path, node in call.inputs:
        if node is stream or path == second:
            continue
        refuse_layer_made(call, path, node, calls)
        given = [dict(c.inputs).get(path) for c in calls]
        shared = all(other is node for other in given)
        dtype = str(node.meta["dtype"]).removeprefix("torch.")
        found.append(SideInput(path, node.meta["shape"], dtype, shared))
    return tuple(found)


def refuse_layer_made(call: ModuleCall, path: Path, node: fx.Node, calls: list[ModuleCall]) -> None:
    makers = [c for c in calls if c.order in node.meta["calls"] and c.order != call.order]
    if makers:
        argument = ".".join(map(str, path))
        floating = ops.is_floating(node)
        several = floating and node.meta["shape"] and len(makers) == 1 and carried_by_all(path, calls)
        raise Refused(
            f"argument {argument} of {call.path} is made inside {makers[0].path}"
            + (": the layers carry more than one stream" if several else ", which a block without that layer lacks"),
            node=describe(node),
            kind="several-streams" if several else "layer-made-input",
            hint="compute it before the first layer and give it to every layer",
        )


def carried_by_all(path: Path, calls: list[ModuleCall]) -> bool:
    """Whether every layer after the first receives at `path` something that the layer before it made."""
    for before, call in pairwise(calls):
        node = dict(call.inputs).get(path)
        if node is None or before.order not in node.meta["calls"]:
            return False
    return True


def outside_parts(calls: list[ModuleCall], evidence: Evidence) -> tuple[str, ...]:
    """Parts of layers that also run outside of all layers, as an embedder that the head uses too: they belong to the
    periphery.

    Raises:
        Refused: a part with weights also runs inside another layer.
    """
    found: list[str] = []
    paths = [call.path for call in calls]
    for call in evidence.recording.calls:
        home = next((path for path in paths if call.path.startswith(path + ".")), None)
        weights = any(True for _ in evidence.model.get_submodule(call.path).parameters())
        if home is None or home in call.scope or not weights:
            continue
        if any(path in call.scope for path in paths):
            raise Refused(
                f"{call.path} is part of a layer but is also used in another one",
                node=call.path,
                kind="shared-part",
                hint="give each layer its own module",
            )
        if not any(call.path.startswith(part + ".") for part in found):
            found.append(call.path)
    return tuple(dict.fromkeys(found))
