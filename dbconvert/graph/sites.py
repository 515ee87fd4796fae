"""Where conditioning goes: for each residual branch the module whose output is modulated and the one that is gated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from dbconvert.anatomy import Axes, Branch, FunctionCall, GateSite, NormSite, Placement, Use
from dbconvert.errors import Refused
from dbconvert.graph import ops
from dbconvert.graph.evidence import Evidence
from dbconvert.graph.spine import ResidualAdd
from dbconvert.graph.tape import ModuleCall, argument_leaves, called, describe


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
        """The path below the layer; empty for the layer itself."""
        return path[len(self.call.path) + 1 :]

    def on_spine(self, position: int) -> tuple[fx.Node, ...]:
        """What stands on the spine right after the addition at `position`."""
        last = position == len(self.additions) - 1
        return self.after_last if last else self.additions[position + 1].on_spine


def branches(run: LayerRun, evidence: Evidence) -> tuple[Branch, ...]:
    """The residual branches of a layer with their sites, in the order of the stream.

    A site is the output of a module that the layer calls once; where it has none, the call of a function.

    Raises:
        Refused: there is neither.
    """
    found = []
    for position, add in enumerate(run.additions):
        for term in add.branches:
            own = replace(add, source=stream_of(add, term, evidence))
            placement, norm = norm_site(run, position, own, term, evidence)
            gate = gate_site(run, own, term, evidence)
            found.append(Branch(add.node.name, placement, norm, gate))
    return tuple(found)


def stream_of(add: ResidualAdd, term: fx.Node, evidence: Evidence) -> fx.Node:
    """What a branch is computed from: the last sum on the way to an addition, else the stream before it."""
    reach = evidence.spines.reach
    partial = [node for node in add.partial if reach.is_ancestor(node, term)]
    return max(partial, key=lambda node: reach.index[node], default=add.source)


def on_spine(run: LayerRun) -> list[fx.Node]:
    """Everything that stands on a layer's stream after its additions."""
    return [node for position in range(len(run.additions)) for node in run.on_spine(position)]


# -- norms ------------------------------------------------------------------------------------------------


def norm_site(
    run: LayerRun, position: int, add: ResidualAdd, term: fx.Node, evidence: Evidence
) -> tuple[Placement, NormSite]:
    model = evidence.model
    inside = [n for n in evidence.spines.reach.between(add.source, [term]) if n not in add.on_spine]
    norms = [n for n in inside if ops.is_norm(n, model)]
    before = [n for n in norms if reads_stream(n, add, evidence)]
    if before:
        return "pre", norm_at(run, before[0], evidence)
    end = ops.origin(term)
    if ops.is_norm(end, model):
        return "end", norm_at(run, end, evidence)
    after = [n for n in run.on_spine(position) if ops.is_norm(n, model)]
    if after:
        return "spine", norm_at(run, after[-1], evidence)
    wide = [n for n in norms if ops.size(n) == ops.size(add.node)]
    if wide:
        return "inner", norm_at(run, wide[0], evidence)
    return "input", input_site(run, add, term, evidence)


def reads_stream(node: fx.Node, add: ResidualAdd, evidence: Evidence) -> bool:
    source = ops.first(node)
    return source is not None and evidence.spines.look_through(source)[0] is add.source


def norm_at(run: LayerRun, node: fx.Node, evidence: Evidence) -> NormSite:
    axes = evidence.axes(node, run.width)
    features = node.meta["shape"][axes.channel]
    path = str(node.target)
    if node.op == "call_function":
        module, call = function_at(run, node, evidence)
        return NormSite(node.name, module, features, axes, call=call)
    if not run.inside(path):
        raise functional("a norm of the layer lies outside of it", node)
    if evidence.times_called(path, run.call) != 1:
        raise functional("a norm of the layer is called more than once", node)
    return NormSite(node.name, run.relative(path), features, axes)


def function_at(run: LayerRun, node: fx.Node, evidence: Evidence, *, within: str = "") -> tuple[str, FunctionCall]:
    """The innermost module that runs once in the layer and makes this call, relative to the layer, and which call
    of its name it is.

    Args:
        within: count in this module instead, an absolute path.
    """
    for path, nth in zip(reversed(node.meta["scope"]), reversed(node.meta.get("nth", ())), strict=False):
        once = path == run.call.path or (run.inside(path) and evidence.times_called(path, run.call) == 1)
        if once and within in ("", path):
            return run.relative(path), FunctionCall(called(node.target), nth)  # type: ignore[arg-type]
    if not node.meta.get("nth"):
        raise functional(
            f"a norm or a branch ends in `{ops.function_name(node)}`, which is no call of a function", node
        )
    raise functional("a function call at a site happens outside of the layer", node)


def input_site(run: LayerRun, add: ResidualAdd, term: fx.Node, evidence: Evidence) -> NormSite:
    """Where the stream enters a branch without any norm: the outermost module that takes it, else all functions."""
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
    uses = tuple(use for node in inside for use in uses_of_stream(run, node, add, evidence))
    if not uses:
        raise functional("neither a module nor a function of the layer takes the stream into this branch", term)
    axes = uses[0].axes
    return NormSite(add.source.name, "", run.width, axes, uses=tuple(sorted(uses, key=str)))


def uses_of_stream(run: LayerRun, node: fx.Node, add: ResidualAdd, evidence: Evidence) -> list[Use]:
    """The arguments in which a function of a branch reads the stream itself, but for views and casts."""
    if node.op != "call_function" or ops.unchanged(node) is not None:
        return []
    read = [
        (path, leaf)
        for path, leaf in argument_leaves(node.args, node.kwargs)
        if isinstance(leaf, fx.Node) and evidence.spines.look_through(leaf)[0] is add.source
    ]
    found = []
    for path, leaf in read:
        _, call = function_at(run, node, evidence, within=run.call.path)
        found.append(Use(call, path, evidence.axes(leaf, run.width)))
    return found


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
        node = before or ops.scaled(node)
    return gate_at_function(run, term, evidence)


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


def gate_at_function(run: LayerRun, term: fx.Node, evidence: Evidence) -> GateSite:
    """The last function call of a branch, past modules that hand their input on and serve several branches."""
    node: fx.Node | None = term
    while node is not None and node.op != "call_function":
        node = ops.unchanged(node)
    if node is None or len(node.meta["shape"]) != run.rank:
        raise functional("the end of a branch is neither a module that is called once nor a function", term)
    module, call = function_at(run, node, evidence)
    axes = Axes(evidence.batch_axis(node), run.channel - run.rank)
    return GateSite(node.name, module, node.meta["shape"][run.channel], axes, call=call)


def functional(what: str, node: fx.Node) -> Refused:
    return Refused(
        f"{what}, so that there is no place to put conditioning",
        node=describe(node),
        kind="functional",
        hint="write the norm and the last projection of each branch as modules that each layer calls once",
    )
