"""What surrounds the stack: the stem that makes the stream, the readout that uses it, and the head at its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from dbconvert.anatomy import Change, Embedding, Head, Input, Layer, Part
from dbconvert.graph import ops
from dbconvert.graph.evidence import Evidence
from dbconvert.graph.pictures import find_picture


@dataclass(frozen=True)
class StackFacts:
    """What was read of a stack.

    Args:
        entering, end: the nodes of the stream before the first layer and after the last.
        outside: parts of layers that belong to the periphery.
        tapped: layers whose stream is also read outside of all layers.
    """

    layers: tuple[Layer, ...]
    entering: fx.Node
    end: fx.Node
    outside: tuple[str, ...]
    tapped: tuple[str, ...]


def surroundings(evidence: Evidence, inputs: dict[str, Any], facts: StackFacts) -> dict[str, Any]:
    """What an anatomy says of the layers, the stream, and what lies around them."""
    stem, readout = stem_and_readout(evidence, {layer.path for layer in facts.layers}, facts.end, facts.outside)
    axes = evidence.axes(facts.entering)
    return {
        "network": type(evidence.model).__name__,
        "layers": facts.layers,
        "width": facts.entering.meta["shape"][axes.channel],
        "streams": 2 if facts.layers[0].second_in else 1,
        "stream_shape": facts.entering.meta["shape"],
        "axes": axes,
        "post_norm": any(layer.on_spine for layer in facts.layers),
        "stem": stem,
        "readout": readout,
        "head": find_head(evidence, facts.end),
        "inputs": named_inputs(inputs),
        "tied": tied_parameters(evidence.model),
        "outside": facts.outside,
        "embedding": find_embedding(evidence, facts.entering),
        "picture": find_picture(evidence, facts.entering, facts.end),
    }


def stem_and_readout(
    evidence: Evidence, layer_paths: set[str], end: fx.Node, outside: tuple[str, ...]
) -> tuple[Part, Part]:
    """Modules outside the layers, with `outside` parts of them: the readout is what depends on the stack's result, the
    stem is the rest."""
    reach, model = evidence.spines.reach, evidence.model
    readout: dict[str, None] = {}
    for node in evidence.recording.graph.nodes:
        if not reach.is_ancestor(end, node):
            continue
        for user in (node, *(n for n in node.all_input_nodes if n.op == "get_attr")):
            if user.op in ("call_module", "get_attr") and not str(user.target).startswith("_constant"):
                readout[owner_path(user, model)] = None

    def in_layer(name: str) -> bool:
        return lies_in(name, layer_paths) and not lies_in(name, outside)

    stem: dict[str, None] = {}
    for name in (name for name, _ in model.named_parameters() if not in_layer(name)):
        owner = name.rpartition(".")[0]
        if owner not in readout:
            stem[owner] = None
    after = [path for path in readout if not in_layer(path)]
    return part(list(stem), model), part(after, model)


def weights_of(path: str, model: nn.Module, outside: tuple[str, ...]) -> dict[str, Any]:
    """A layer's class and its own weights, without the parts that belong to the periphery, as `Layer` holds them."""
    module = model.get_submodule(path)
    own = [p for name, p in module.named_parameters() if not lies_in(f"{path}.{name}", outside)]
    return {
        "type": type(module).__name__,
        "parameters": sum(p.numel() for p in own),
        "bytes": sum(p.numel() * p.element_size() for p in own),
    }


def lies_in(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(parent + ".") for parent in parents)


def owner_path(node: fx.Node, model: nn.Module) -> str:
    target = str(node.target)
    return target if node.op == "call_module" else target.rpartition(".")[0]


def part(paths: list[str], model: nn.Module) -> Part:
    """Modules and the parameters directly in them; modules without weights are left out."""
    weights = {}
    kept = []
    for path in paths:
        own = list(model.get_submodule(path).parameters(recurse=False))
        if own:
            kept.append(path)
        weights.update({id(p): p for p in own})
    parameters = list(weights.values())
    total = sum(p.numel() for p in parameters)
    return Part(tuple(kept), total, sum(p.numel() * p.element_size() for p in parameters))


def find_head(evidence: Evidence, end: fx.Node) -> Head | None:
    """The linear module whose result is the network's first floating output, and how it reads the stack.

    None when the output is not the plain result of one module, as in networks that return features.
    """
    for output, node in evidence.recording.outputs:
        if not ops.is_floating(node) or not evidence.spines.reach.is_ancestor(end, node):
            continue
        made, after = look_back(node, evidence.model)
        module = ops.module_of(made, evidence.model)
        if not isinstance(module, nn.Linear) or len(evidence.recording.calls_of(str(made.target))) != 1:
            return None
        features = ops.first(made)
        if features is None:
            return None
        token, pooled = how_read(features, end, evidence)
        labels = rows_of_scores(node, made)
        return Head(str(made.target), module.in_features, module.out_features, output, token, pooled, after, labels)
    return None


def rows_of_scores(output: fx.Node, made: fx.Node) -> int:
    """L, where the last axis L K of what a head made is two axes, L and K, of the network's output."""
    before, after = tuple(made.meta["shape"]), tuple(output.meta["shape"])
    split = len(after) > 1 and before == (*after[:-2], after[-2] * after[-1])
    return after[-2] if split else 1


def look_back(node: fx.Node, model: nn.Module) -> tuple[fx.Node, tuple[Change, ...]]:
    """The node that made an output's numbers, and what was done to them since: scalings, softcaps, a softmax at the
    end."""
    after: list[Change] = []
    while True:
        node = ops.origin(node)
        change = ops.elementwise(node) or (None if after else ops.normalised(node, model))
        source = ops.first(node)
        if change is None or source is None:
            return node, tuple(reversed(after))
        after.append(change)
        node = source


def find_embedding(evidence: Evidence, entering: fx.Node) -> Embedding | None:
    """The only table that is looked up with one of the network's own whole-number inputs on the way to the stream."""
    found = []
    for node in evidence.recording.graph.nodes:
        module = ops.module_of(node, evidence.model)
        given = ops.first(node)
        reaches = node is ops.origin(entering) or evidence.spines.reach.is_ancestor(node, entering)
        if not isinstance(module, nn.Embedding) or given is None or not reaches:
            continue
        made = ops.origin(given)
        if made.op == "placeholder" and len(made.meta["shape"]) == 2:
            argument = str(made.target).removeprefix("input_")
            found.append(Embedding(str(node.target), module.num_embeddings, node.meta["shape"][-1], argument))
    return found[0] if len(found) == 1 else None


def how_read(features: fx.Node, end: fx.Node, evidence: Evidence) -> tuple[int | None, bool]:
    """(token, pooled): which position of the stream the head's input comes from, and whether it is one vector."""
    rank = len(features.meta["shape"])
    pooled = rank == 2  # [N, features]
    token = None
    for node in evidence.spines.reach.between(end, [features]):
        found, source = picked(node), ops.first(node)
        if found is None or source is None or len(node.meta.get("shape") or ()) != rank:
            continue
        axes, axis = evidence.axes(source), found[0]
        if axis not in (axes.batch, axes.channel + len(source.meta["shape"])):
            token = found[1]
    return (token, True) if pooled else (None, False)


def picked(node: fx.Node) -> tuple[int, int] | None:
    """(axis, index) of what takes one place of one axis and all of the others: x[:, i], x[i], x.select(1, i)."""
    source = ops.first(node)
    rank = 0 if source is None else len(source.meta.get("shape") or ())
    if not rank or ops.function_name(node) not in ("getitem", "select"):
        return None
    if ops.function_name(node) == "select":
        axis, index = node.args[1], node.args[2]
        return (axis % rank, index) if isinstance(axis, int) and isinstance(index, int) else None
    parts = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    dots = [place for place, one in enumerate(parts) if one is ...]
    numbers = [(place, one) for place, one in enumerate(parts) if isinstance(one, int)]
    if len(numbers) != 1 or any(one != slice(None) for one in parts if one is not ... and not isinstance(one, int)):
        return None
    place, index = numbers[0]
    return (place if not dots or place < dots[0] else rank - len(parts) + place), index


def named_inputs(inputs: dict[str, Any]) -> tuple[Input, ...]:
    return tuple(
        Input(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), not batched(value, inputs))
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    )


def batched(value: Any, inputs: dict[str, Any]) -> bool:
    """Whether an argument has a row for every example: as many as the first one."""
    batch = next((v.shape[0] for v in inputs.values() if isinstance(v, Tensor) and v.dim()), 0)
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch


def tied_parameters(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names under which one parameter is registered more than once."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)
