"""Layers that a user describes, where the graph shows no stack: an adapter's three answers, checked.

A layer need not be residual here. Where its additions show, conditioning goes to its branches as always; where they
do not, the whole layer g is conditioned: gate * g(x (1 + scale) + shift) + (1 - gate) * x.
"""

from __future__ import annotations

from torch import fx

from dbconvert.anatomy import Adapter, Axes, Branch, GateSite, Layer, NormSite
from dbconvert.errors import Refused
from dbconvert.graph import ops, sites
from dbconvert.graph.evidence import Evidence
from dbconvert.graph.layers import refuse_glue, side_inputs
from dbconvert.graph.parts import weights_of
from dbconvert.graph.spine import ResidualAdd
from dbconvert.graph.tape import ModuleCall, describe


def adapted_calls(adapter: Adapter, evidence: Evidence) -> list[ModuleCall]:
    """The call of each layer that an adapter names; a container stands for its children.

    Raises:
        Refused: there is no such module, or it does not run exactly once.
    """
    modules = dict(evidence.model.named_modules())
    found = []
    for path in adapter.layers:
        if path not in modules:
            raise wrong(f"the network has no module {path}", path, "name a container, or the layers one by one")
        calls = evidence.recording.calls_of(path)
        names = [path] if calls else [f"{path}.{child}" for child, _ in modules[path].named_children()]
        for name in names:
            runs = evidence.recording.calls_of(name)
            if len(runs) != 1:
                raise wrong(f"{name} runs {len(runs)} times in one forward pass", name, "a layer must run once")
            found.append(runs[0])
    if len(found) < 2:
        raise wrong(f"the adapter names {len(found)} layers", ", ".join(adapter.layers), "a stack needs two")
    return sorted(found, key=lambda call: call.order)


def stream_of(adapter: Adapter, call: ModuleCall) -> tuple[fx.Node, fx.Node]:
    """What carries the stream into a layer and out of it.

    Raises:
        Refused: the layer has no such argument or output, or they differ in shape.
    """
    entering, leaving = dict(call.inputs).get(adapter.enters), dict(call.outputs).get(adapter.leaves)
    if entering is None:
        there = ", ".join(map(str, dict(call.inputs))) or "none"
        raise wrong(f"{call.path} has no tensor argument {adapter.enters}", call.path, f"its tensors: {there}")
    if leaving is None or len(adapter.leaves) > 1:
        there = ", ".join(map(str, dict(call.outputs))) or "none"
        raise wrong(f"{call.path} has no tensor output {adapter.leaves}", call.path, f"its tensors: {there}")
    if not ops.same_shape(entering, leaving):
        before, after = (list(node.meta["shape"]) for node in (entering, leaving))
        raise Refused(
            f"dimensions change: {call.path} maps {before} to {after}, and every block must keep the shape",
            node=describe(leaving),
            kind="dimensions",
            hint="leave that layer out of the adapter's layers",
        )
    return entering, leaving


def adapted_layers(
    adapter: Adapter, calls: list[ModuleCall], evidence: Evidence, channel: int, width: int, outside: tuple[str, ...]
) -> tuple[Layer, ...]:
    """The facts of every layer that an adapter names.

    Raises:
        Refused: with the node at fault, for anything that running a layer alone would break.
    """
    layers: list[Layer] = []
    previous: fx.Node | None = None
    for call in calls:
        entering, leaving = stream_of(adapter, call)
        if previous is not None:
            refuse_glue(previous, entering, call.path, evidence)
        previous = leaving
        found, on_spine = branches(adapter, call, (entering, leaving), evidence, channel, width)
        layers.append(
            Layer(
                path=call.path,
                stream_in=adapter.enters,
                stream_out=adapter.leaves,
                form=call.form,
                branches=found,
                on_spine=tuple(node.name for node in on_spine),
                side_inputs=side_inputs(call, entering, calls, evidence),
                **weights_of(call.path, evidence.model, outside),
            )
        )
    return tuple(layers)


def branches(
    adapter: Adapter, call: ModuleCall, stream: tuple[fx.Node, fx.Node], evidence: Evidence, channel: int, width: int
) -> tuple[tuple[Branch, ...], tuple[fx.Node, ...]]:
    """A layer's residual branches and what stands on its stream, or the whole layer as one branch."""
    entering, leaving = stream
    additions, after_last = inner_additions(call, entering, leaving, evidence)
    if additions:
        run = sites.LayerRun(call, additions, after_last, len(entering.meta["shape"]), channel, width)
        try:
            return sites.branches(run, evidence), tuple(sites.on_spine(run))
        except Refused:
            pass  # the whole layer then
    axes = Axes(evidence.batch_axis(entering), channel - len(entering.meta["shape"]))
    norm = NormSite(entering.name, "", width, axes, (adapter.enters,))
    gate = GateSite(leaving.name, "", width, axes, adapter.leaves, against=adapter.enters)
    return (Branch(leaving.name, "layer", norm, gate),), ()


def inner_additions(
    call: ModuleCall, entering: fx.Node, leaving: fx.Node, evidence: Evidence
) -> tuple[tuple[ResidualAdd, ...], tuple[fx.Node, ...]]:
    """The residual additions that lead from a layer's input to its output, none if they do not span it."""
    end, after_last = evidence.spines.look_through(leaving)
    inside = tuple(add for add in evidence.spines.chain(end) if call.order in add.node.meta["calls"])
    spans = inside and inside[0].source is evidence.spines.look_through(entering)[0]
    return (inside, after_last) if spans else ((), ())


def wrong(what: str, node: str, hint: str) -> Refused:
    return Refused(what, node=node, kind="adapter", hint=hint)
