"""Conditioning that a layer brings itself: AdaLN, AdaLN-single, adaLN-zero. It is reused, and nothing is injected."""

from __future__ import annotations

from torch import fx

from dbconvert.graph import ops
from dbconvert.graph.evidence import Evidence
from dbconvert.graph.sites import LayerRun


def conditioned_by(run: LayerRun, evidence: Evidence) -> tuple[str, ...]:
    """Names of the network's inputs whose vectors, one an example, multiply what a layer's branches compute.

    Such a factor has the stream's channels and no positions, [N, 1, d], and does not come from the stream.
    """
    found: dict[str, None] = {}
    for add in run.additions:
        for node in evidence.spines.reach.between(add.source, add.branches):
            if ops.function_name(node) in ops.SCALINGS and len(node.meta["shape"]) == run.rank:
                for factor in (a for a in node.args[:2] if isinstance(a, fx.Node)):
                    if one_vector_an_example(factor, node, run, evidence):
                        found.update(dict.fromkeys(inputs_of(factor, add.source, evidence)))
    return tuple(found)


def one_vector_an_example(factor: fx.Node, product: fx.Node, run: LayerRun, evidence: Evidence) -> bool:
    shape = factor.meta.get("shape") or ()
    batch = evidence.batch_axis(product)
    kept = {batch: product.meta["shape"][batch], run.channel: run.width}
    whole = (*[1] * (run.rank - len(shape)), *shape)
    return all(size == kept.get(axis, 1) for axis, size in enumerate(whole))


def inputs_of(factor: fx.Node, stream: fx.Node, evidence: Evidence) -> list[str]:
    """The network's inputs that a node is computed from; none if it is computed from the stream."""
    reach = evidence.spines.reach
    if reach.is_ancestor(stream, factor):
        return []
    return [str(path[0]) for path, node in evidence.recording.inputs if reach.is_ancestor(node, factor)]
