"""Where conditioning goes: for each residual branch the module whose output is modulated and the one that is gated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dbconvert.anatomy import Axes, Branch, GateSite, NormSite, Placement
from dbconvert.errors import Refused
from dbconvert.graph import ops
from dbconvert.graph.evidence import Evidence
from dbconvert.graph.spine import ResidualAdd
from dbconvert.graph.tape import ModuleCall, describe


@dataclass(frozen=True)
class LayerRun:
    """One layer as it ran: its call, its additions, and the norms between its last addition and its output.

    The stream has `rank` axes; `channel`, counted from the front, is that of its channels, and `width` its size.
    """

    call: ModuleCall
    additions: tuple[ResidualAdd, ...]
    after_last: tuple[fx.Node, ...]
    rank: int
    channel: int
    width: int

    def inside(self, path: str) -> bool:
        return path.startswith(self.call.path + ".")

    def relative(self, path: str) -> str:
        return path[len(self.call.path) + 1 :]

    def on_spine(self, position: int) -> tuple[fx.Node, ...]:
        """What stands on the spine right after the addition at `position`."""
        last = position == len(self.additions) - 1
        return self.after_last if last else self.additions[position + 1].on_spine


def branches(run: LayerRun, evidence: Evidence) -> tuple[Branch, ...]:
    """The residual branches of a layer with their sites, in the order of the stream.

    Raises:
        Refused: a norm or a branch's end is written as a function, so that no module stands at the site.
    """
    found = []
    for position, add in enumerate(run.additions):
        for term in add.branches:
            placement, norm = norm_site(run, position, term, evidence)
            gate = gate_site(run, add, term, evidence)
            found.append(Branch(add.node.name, placement, norm, gate))
    return tuple(found)


# -- norms ------------------------------------------------------------------------------------------------


def norm_site(run: LayerRun, position: int, term: fx.Node, evidence: Evidence) -> tuple[Placement, NormSite]:
    add = run.additions[position]
    model = evidence.model
    inside = [n for n in evidence.spines.reach.between(add.source, [term]) if n not in add.on_spine]
    norms = [n for n in inside if ops.is_norm(n, model)]
    before = [n for n in norms if reads_stream(n, add, evidence)]
    if before:
        return "pre", module_norm(run, before[0], evidence)
    end = ops.origin(term)
    if ops.is_norm(end, model):
        return "end", module_norm(run, end, evidence)
    after = [n for n in run.on_spine(position) if ops.is_norm(n, model)]
    if after:
        return "spine", module_norm(run, after[-1], evidence)
    wide = [n for n in norms if ops.size(n) == ops.size(add.node)]
    if wide:
        return "inner", module_norm(run, wide[0], evidence)
    return "input", input_site(run, add, term, evidence)


def reads_stream(node: fx.Node, add: ResidualAdd, evidence: Evidence) -> bool:
    source = ops.first(node)
    return source is not None and evidence.spines.look_through(source)[0] is add.source


def module_norm(run: LayerRun, node: fx.Node, evidence: Evidence) -> NormSite:
    path = str(node.target)
    if node.op != "call_module" or not run.inside(path):
        raise functional("a norm of the layer is written as a function", node)
    if evidence.times_called(path, run.call) != 1:
        raise functional("a norm of the layer is called more than once", node)
    axes = evidence.axes(node, run.width)
    return NormSite(node.name, run.relative(path), node.meta["shape"][axes.channel], axes)


def input_site(run: LayerRun, add: ResidualAdd, term: fx.Node, evidence: Evidence) -> NormSite:
    """The outermost module of the layer that takes the stream into a branch without any norm."""
    inside = set(evidence.spines.reach.between(add.source, [term]))
    for call in evidence.recording.calls:
        if run.call.order not in call.parents or evidence.times_called(call.path, run.call) != 1:
            continue
        taking = [(path, n) for path, n in call.inputs if evidence.spines.look_through(n)[0] is add.source]
        if taking and any(node in inside for _, node in call.outputs):
            node = taking[0][1]
            axes = evidence.axes(node, run.width)
            arguments = tuple(path for path, _ in taking)
            return NormSite(node.name, run.relative(call.path), node.meta["shape"][axes.channel], axes, arguments)
    raise functional("no module of the layer takes the stream into this branch", term)


# -- gates ------------------------------------------------------------------------------------------------


def gate_site(run: LayerRun, add: ResidualAdd, term: fx.Node, evidence: Evidence) -> GateSite:
    """The last module of a branch through which a factor a channel commutes, walking back from the addition."""
    node: fx.Node | None = term
    # Some layers add in a flattened form, [N T, d]; the stream's own axis holds where the rank is the stream's.
    flattened = len(add.node.meta["shape"]) != run.rank
    channel: int | None = evidence.channel_axis(add.node, run.width) if flattened else run.channel
    while node is not None and channel is not None and node is not add.source:
        site = gate_at(run, node, channel, evidence)
        if site is not None:
            return site
        before = ops.unchanged(node)
        channel = ops.axis_before(node, channel) if before is not None else channel
        node = before or scaled(node)
    raise functional("the end of a branch is written as a function", term)


def gate_at(run: LayerRun, node: fx.Node, channel: int, evidence: Evidence) -> GateSite | None:
    """The innermost module, called once in the layer, that returned exactly this node, with its channel axis."""
    leaving = [
        (call, path)
        for call, path in evidence.exits.get(node, ())
        if run.call.order in call.parents and evidence.times_called(call.path, run.call) == 1 and len(path) <= 1
    ]
    if not leaving:
        return None
    call, path = max(leaving, key=lambda pair: len(pair[0].parents))
    shape = node.meta["shape"]
    axes = Axes(evidence.batch_axis(node), channel - len(shape))
    return GateSite(node.name, run.relative(call.path), shape[channel], axes, path)


def scaled(node: fx.Node) -> fx.Node | None:
    """x, if the node is x times (or over) a number or a weight, as inline layer scale is."""
    if ops.function_name(node) not in ("mul", "rmul", "imul", "mul_", "div", "truediv"):
        return None
    values = [a for a in node.args[:2] if isinstance(a, fx.Node) and a.op != "get_attr"]
    return values[0] if len(values) == 1 else None


def functional(what: str, node: fx.Node) -> Refused:
    return Refused(
        f"{what}, so that there is no module to put conditioning on",
        node=describe(node),
        kind="functional",
        hint="write the norm and the last projection of each branch as modules that are called once a layer",
    )
