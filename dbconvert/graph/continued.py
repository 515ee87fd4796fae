"""Stacks that go on in layers of another kind: what two streams run through from list to list is one stack."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import fx

from dbconvert.graph import ops
from dbconvert.graph.pieces import cut_from, joined_along, joined_at, joined_parts, piece
from dbconvert.graph.spine import Spines
from dbconvert.graph.stack import Stack, call_of, stacks_of_chain, within
from dbconvert.graph.tape import ModuleCall, Recording


def with_continued(stacks: list[Stack], recording: Recording, spines: Spines) -> list[Stack]:
    """The stacks, and beside them those that two or more of them are together; most work first."""
    place = spines.reach.index
    in_order = sorted(stacks, key=lambda s: place[s.layers[0][1][0].node])
    found: list[Stack] = []
    for i, first in enumerate(in_order):
        whole = first
        for after in in_order[i + 1 :]:
            whole = one_stack(whole, after, recording, spines) or whole
        if whole is not first and not any(within(whole, longer) for longer in found):
            found.append(whole)
    return sorted([*stacks, *found], key=lambda s: -s.work)


def one_stack(before: Stack, after: Stack, recording: Recording, spines: Spines) -> Stack | None:
    """Two stacks as one; None if the second does not begin where the first ends, or the first carries one stream."""
    if before.calls > 1 or after.calls > 1 or before.join is not None or after.join is not None:
        return None
    begin, join = after.layers[0][1][0].source, None
    if begin is not before.layers[-1][1][-1].node:
        found = read_later(before, after, recording, spines)
        if found is None:
            return None
        before, join = found, begin
    first, second = calls_in(before, recording), calls_in(after, recording)
    if len(first) < len(before.layers) or len(second) < len(after.layers):
        return None
    apart = first if join is not None else [*first, *second]
    if any(handed_on(one, list(nodes_in(other))) < 2 for one, other in pairwise(apart)):
        return None
    if join is not None and handed_on(first[-1], joined_parts(join)) < max(2, len(joined_parts(join))):
        return None
    return Stack(
        f"{before.container}, {after.container}",
        (*before.layers, *after.layers),
        1,
        (*before.left_out, *after.left_out),
        before.work + after.work,
        join,
    )


def read_later(before: Stack, after: Stack, recording: Recording, spines: Spines) -> Stack | None:
    """The first stack along that of its streams which is read after the second, where it lies beside others in one
    tensor; None if the second one does not begin so, or all is read."""
    join, end = after.layers[0][1][0].source, after.layers[-1][1][-1].node
    if joined_along(join) is None:
        return None
    taken = ((node, cut_from(node)) for node in spines.reach.nodes if spines.reach.is_ancestor(end, node))
    cuts = (piece(node) for node, whole in taken if whole is not None and spines.look_through(whole)[0] is end)
    read = (joined_at(join, cut) for cut in cuts if cut is not None)
    stream = next((part for part in read if part is not None), None)
    if stream is None:
        return None
    last, _ = spines.look_through(stream)
    same = (s for s in stacks_of_chain(spines.chain(last), recording, spines) if s.container == before.container)
    return next((s for s in same if s.layers[-1][1][-1].node is last), None)


def calls_in(stack: Stack, recording: Recording) -> list[ModuleCall]:
    """The call of each layer that is called."""
    orders = (call_of(additions[0], path) for path, additions in stack.layers)
    return [recording.calls[order] for order in orders if order is not None]


def nodes_in(call: ModuleCall) -> Iterator[fx.Node]:
    return (node for _, node in call.inputs)


def handed_on(call: ModuleCall, given: list[fx.Node]) -> int:
    """How many tensors are just what a call returned."""
    made = [node for _, node in call.outputs if ops.is_floating(node)]
    return sum(any(ops.stays(node, one) for node in made) for one in given)
