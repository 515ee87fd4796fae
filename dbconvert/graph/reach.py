"""Who depends on whom in a graph, as bit sets: one integer a node."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from dbconvert.graph import ops


class Reach:
    """The nodes that every node's numbers are computed from; n^2/8 bytes for n nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.ancestors: list[int] = []
        for node in self.nodes:
            bits = 0
            for source in ops.value_inputs(node):
                i = self.index[source]
                bits |= self.ancestors[i] | (1 << i)
            self.ancestors.append(bits)

    def is_ancestor(self, early: fx.Node, late: fx.Node) -> bool:
        return bool(self.ancestors[self.index[late]] >> self.index[early] & 1)

    def between(self, source: fx.Node, ends: Iterable[fx.Node]) -> list[fx.Node]:
        """Nodes that depend on `source` and lead to one of `ends` (ends included, source not), in order."""
        bits = 0
        for end in ends:
            i = self.index[end]
            bits |= self.ancestors[i] | (1 << i)
        start = self.index[source]
        return [
            node
            for i, node in enumerate(self.nodes[start + 1 :], start + 1)
            if bits >> i & 1 and self.ancestors[i] >> start & 1
        ]
