"""Networks that map an image to an image: which inputs are image, time and class, and where the result is."""

from __future__ import annotations

import torch
from torch import fx, nn

from dbconvert.anatomy import Picture
from dbconvert.graph import ops
from dbconvert.graph.evidence import Evidence

IMAGE_AXES, TOKEN_AXES = 4, 3
EARLY = 1e-6
"""A time at which sines of a thousand times it are still straight."""


def find_picture(evidence: Evidence, entering: fx.Node, end: fx.Node) -> Picture | None:
    """The network as a map of images; None if its first floating output has not the shape of one of its inputs.

    The class is what is looked up in a table, the time any other input with one number an example. Networks of
    sequences, [N, S, C], are told a time, or they are none of images.

    Args:
        entering, end: the stream before the first layer and after the last.
    """
    reach = evidence.spines.reach
    given = [(str(path[0]), node) for path, node in evidence.recording.inputs if len(path) == 1]
    made = ((path, n) for path, n in evidence.recording.outputs if ops.is_floating(n) and reach.is_ancestor(end, n))
    output, result = next(made, ((), None))
    axes = 0 if result is None else len(result.meta["shape"])
    if result is None or axes not in (IMAGE_AXES, TOKEN_AXES):
        return None
    images = [name for name, n in given if same_image(n, result) and reach.is_ancestor(n, entering)]
    if len(images) != 1:
        return None
    single = {name: node for name, node in given if len(node.meta["shape"]) == 1 and reach.is_ancestor(node, result)}
    looked_up = {name: rows for name, node in single.items() if (rows := rows_of(node, evidence)) is not None}
    times = tuple(name for name in single if name not in looked_up)
    if axes == TOKEN_AXES and not times:
        return None
    return Picture(
        argument=images[0],
        output=output,
        channels=result.meta["shape"][1 if axes == IMAGE_AXES else -1],
        times=times,
        labels=tuple(looked_up),
        classes=min(looked_up.values(), default=0),
        time_scale=multiplied(single[times[0]], evidence.model) if times else 1.0,
    )


def multiplied(node: fx.Node, model: nn.Module) -> float:
    """The product of the numbers that a value is multiplied by before it is used otherwise, or in its embedding."""
    found = 1.0
    while len(node.users) == 1:
        user = next(iter(node.users))
        change = ops.elementwise(user)
        if change is not None and change.by and ops.first(user) is node:
            found = found * change.by if change.name == "multiply" else found / change.by
        elif ops.unchanged(user) is not node:
            return found * fastest(ops.module_of(user, model))
        node = user
    return found


def fastest(embedding: nn.Module | None) -> float:
    """The highest frequency of an embedding in sines of its input: 1, or what it multiplies its input by; 1 for what is
    none, as for modules with weights."""
    if embedding is None or any(True for _ in embedding.parameters()):
        return 1.0
    try:
        with torch.no_grad():
            at_0, later = embedding(torch.zeros(1)), embedding(torch.full((1,), EARLY))
            slope = float((later - at_0).abs().max()) / EARLY
    except Exception:  # the network's own code, on a made-up input
        return 1.0
    return round(slope, 3) or 1.0


def same_image(node: fx.Node, result: fx.Node) -> bool:
    """Whether a result has the input's shape, or twice an image's channels."""
    shape, made = node.meta["shape"], result.meta["shape"]
    if shape == made:
        return ops.is_floating(node)
    if not ops.is_floating(node) or len(shape) != IMAGE_AXES or made[1] != 2 * shape[1]:
        return False
    return bool((shape[0], *shape[2:]) == (made[0], *made[2:]))


def rows_of(given: fx.Node, evidence: Evidence) -> int | None:
    """Rows of the smallest table that an input is looked up in; None if it is looked up in none."""
    rows = []
    for node in evidence.recording.graph.nodes:
        module, index, table = ops.module_of(node, evidence.model), ops.first(node), None
        if isinstance(module, nn.Embedding):
            table = module.num_embeddings
        elif ops.function_name(node) == "embedding" and isinstance(node.args[1], fx.Node):
            table = node.args[1].meta["shape"][0]
        if table is not None and index is not None and from_input(index, given, evidence):
            rows.append(int(table))
    return min(rows, default=None)


def from_input(index: fx.Node, given: fx.Node, evidence: Evidence) -> bool:
    return index is given or evidence.spines.reach.is_ancestor(given, index)
