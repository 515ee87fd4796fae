"""Why there is nothing to cut: the refusals of a network without a residual stack."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

from torch import fx, nn

from dbconvert.errors import Refused
from dbconvert.graph import ops
from dbconvert.graph.evidence import Evidence
from dbconvert.graph.spine import ResidualAdd
from dbconvert.graph.stack import Stack, branch_homes
from dbconvert.graph.streams import mixed_streams
from dbconvert.graph.tape import ModuleCall, describe


def repeated_siblings(evidence: Evidence) -> list[list[ModuleCall]]:
    """Called modules of one class under one parent, in call order; the group with most parameters first."""
    groups: dict[tuple[str, type], dict[str, ModuleCall]] = defaultdict(dict)
    for call in evidence.recording.calls:
        module = evidence.model.get_submodule(call.path)
        if call.path and any(True for _ in module.children()) and any(True for _ in module.parameters()):
            groups[call.path.rpartition(".")[0], type(module)].setdefault(call.path, call)
    repeated = [list(group.values()) for group in groups.values() if len(group) > 1]
    return sorted(repeated, key=lambda calls: -weight(calls, evidence.model))


def weight(calls: list[ModuleCall], model: nn.Module) -> int:
    return sum(p.numel() for call in calls for p in model.get_submodule(call.path).parameters())


def stream_of(call: ModuleCall) -> tuple[fx.Node, fx.Node] | None:
    """The first floating tensors in and out of a call that have one shape; else the first of either."""
    entering = [n for _, n in call.inputs if ops.is_floating(n)]
    leaving = [n for _, n in call.outputs if ops.is_floating(n)]
    pairs = [(a, b) for a in entering for b in leaving]
    kept = [(a, b) for a, b in pairs if a.meta["shape"] == b.meta["shape"]]
    return next(iter([*kept, *pairs]), None)


def changes_of_shape(groups: list[list[ModuleCall]]) -> Refused | None:
    """The first module among repeated siblings, in call order, whose output has another shape than its input."""
    for call in sorted((call for calls in groups for call in calls), key=lambda call: call.order):
        stream = stream_of(call)
        if stream is not None and stream[0].meta["shape"] != stream[1].meta["shape"]:
            return dimensions_change(call, stream)
    return None


def why_no_stack(evidence: Evidence) -> Refused:
    """The most telling reason why no stack of residual layers was found."""
    groups = repeated_siblings(evidence)
    stream = stream_of(groups[0][0]) if groups else None
    mixed = mixed_streams(groups[0], stream, evidence) if stream is not None else None
    told = mixed or changes_of_shape(groups)
    if told is not None:
        return told
    if groups:
        layers = groups[0]
        return broken_stream(layers, evidence) or added_outside(layers, evidence) or not_residual(layers, evidence)
    if evidence.spines.adds:
        add = next(iter(evidence.spines.adds.values()))
        return Refused(
            "there are residual additions, but no module repeats along them",
            node=describe(add.node),
            kind="functional",
            hint="write the repeated part as a module and keep the layers in an nn.ModuleList",
        )
    return Refused(
        "the network has no stack of repeated layers",
        node=type(evidence.model).__name__,
        kind="no-stack",
        hint="conversion needs at least two residual layers of equal width that follow each other",
    )


def dimensions_change(call: ModuleCall, stream: tuple[fx.Node, fx.Node]) -> Refused:
    before, after = (list(node.meta["shape"]) for node in stream)
    return Refused(
        f"dimensions change: {call.path} maps {before} to {after}, and every block must keep the shape",
        node=describe(stream[1]),
        kind="dimensions",
        hint="only a stack that keeps its shape can be cut; if there is one inside, name it with --stack PATH",
    )


def broken_stream(calls: list[ModuleCall], evidence: Evidence) -> Refused | None:
    """Layers that are residual one by one, but not on one stream; None if one of them is not residual."""
    streams = [stream_of(call) for call in calls]
    if not all(stream and ops.origin(stream[1]) in evidence.spines.adds for stream in streams):
        return None
    for (one, before), (other, after) in pairwise(zip(calls, filter(None, streams), strict=True)):
        if before[1].meta["shape"] != after[0].meta["shape"]:
            shapes = [list(stream[1].meta["shape"]) for stream in (before, after)]
            return Refused(
                f"dimensions change: {one.path} works on {shapes[0]} and {other.path} on {shapes[1]}, and every block "
                "must keep the shape",
                node=describe(after[0]),
                kind="dimensions",
                hint="only a stack that keeps its shape can be cut; these layers make none",
            )
        if evidence.spines.look_through(after[0])[0] is not ops.origin(before[1]):
            return Refused(
                f"{one.path} and {other.path} are residual layers, but the stream does not run from one to the other",
                node=describe(after[0]),
                kind="no-stack",
                hint="let each layer take what the one before it returned, unchanged",
            )
    return None


def added_outside(calls: list[ModuleCall], evidence: Evidence) -> Refused | None:
    """Modules whose results are added to the stream outside of them, where their forward takes the parts of a layer
    from several lists or multiplies the stream between additions; None if it does neither."""
    returned = {ops.origin(node) for _, node in calls[0].outputs}
    adds = [add for add in evidence.spines.adds.values() if calls[0].order not in add.node.meta["calls"]]
    around = [add for add in adds if any(ops.origin(branch) in returned for branch in add.branches)]
    lists = numbered_lists(around[0].node.meta["calls"][-1], evidence) if around else []
    product = next(filter(None, (product_before(add, evidence) for add in adds)), None)
    if not around or (len(lists) < 2 and product is None):
        return None
    where = around[0].node.meta["scope"][-1] or type(evidence.model).__name__
    reason = f"what {calls[0].path} returns is added to the stream outside of it, in the forward of {where}"
    hint = "make each layer one module whose forward contains its additions and norms"
    if len(lists) > 1:
        reason += f"; no module holds the parts of one layer, which lie in {', '.join(lists)}"
    if product is not None:
        reason += "; between two additions the stream is multiplied by another tensor"
        hint += ", and multiply by that tensor inside the branches"
    nodes = [describe(node) for node in (around[0].node, product) if node is not None]
    return Refused(reason, node="; ".join(nodes), kind="around", hint=hint)


def numbered_lists(forward: int, evidence: Evidence) -> list[str]:
    """Containers of several numbered modules that one forward, the call of this order, calls itself."""
    called = [call.path for call in evidence.recording.calls if call.parents[-1:] == (forward,)]
    numbered = Counter(path.rpartition(".")[0] for path in dict.fromkeys(called) if path.rpartition(".")[2].isdigit())
    return [container for container, times in numbered.items() if times > 1]


def product_before(add: ResidualAdd, evidence: Evidence) -> fx.Node | None:
    """The product of an earlier stream with another tensor that an addition starts from, if it does."""
    made = add.source
    streams = [evidence.spines.after_addition(term) for term in ops.operands(made)]
    return made if ops.function_name(made) in ops.SCALINGS and any(streams) else None


def not_residual(calls: list[ModuleCall], evidence: Evidence) -> Refused:
    """A layer that keeps the shape, but whose output is not its input plus something."""
    call = calls[0]
    stream = stream_of(call)
    end = ops.origin(stream[1]) if stream else None
    facts: dict[str, object] = {"stack": call.path.rpartition(".")[0], "layers": len(calls)}
    return Refused(
        f"{call.path} is not residual: its output is not its input plus something computed from it",
        node=describe(end) if end is not None else call.path,
        kind="not-residual",
        hint="blocks start from the stem's output, which only layers of the form x + f(x) can refine",
        facts=facts,
    )


def changing_stages(evidence: Evidence, stack: Stack) -> Refused | None:
    """Residual stages of other shapes that hold more than the stack found: then the stack is only a part.

    A U-Net or a pyramid has small residual stacks inside; converting one of them is a choice of the user's.
    """
    model = evidence.model
    inside = sum(p.numel() for path, _ in stack.layers for p in model.get_submodule(path).parameters())
    additions = [set(add.meta["calls"]) for add in evidence.spines.adds]
    groups = [[c for c in g if any(c.order in calls for calls in additions)] for g in repeated_siblings(evidence)]
    stages = [g for g in groups if len(g) > 1 and changes_of_shape([g]) is not None]
    if sum(weight(g, model) for g in stages) > inside:
        return changes_of_shape(stages)
    return other_shapes(evidence, stack, inside)


def other_shapes(evidence: Evidence, stack: Stack, inside: int) -> Refused | None:
    """A residual addition of another shape, where those outside of the stack have more weights in their branches than
    the stack has; of a skip around the stack those beside it count."""
    paths = {path for path, _ in stack.layers}
    shape = stack.layers[0][1][0].node.meta["shape"]
    outside = [add for add in evidence.spines.adds.values() if not paths & set(add.node.meta["scope"])]
    homes = {home for add in outside for home in branch_homes(add, evidence.spines)}
    modules = dict(evidence.model.named_modules())
    own = {id(p) for path in paths for p in modules[path].parameters()}
    weights = {
        id(p): p.numel() for home in homes & set(modules) for p in modules[home].parameters() if id(p) not in own
    }
    different = [add.node for add in outside if add.node.meta["shape"] != shape]
    if not different or sum(weights.values()) <= inside:
        return None
    return Refused(
        f"dimensions change: residual layers work on {list(shape)} in {stack.container} and on "
        f"{list(different[0].meta['shape'])} elsewhere, and every block must keep the shape",
        node=describe(different[0]),
        kind="dimensions",
    )
