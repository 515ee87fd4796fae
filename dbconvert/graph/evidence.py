"""The recordings that an analysis reads, with the questions it asks of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx, nn

from dbconvert.anatomy import Axes
from dbconvert.errors import Refused
from dbconvert.graph import ops
from dbconvert.graph.spine import Spines
from dbconvert.graph.tape import ModuleCall, Path, Recording, describe

CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm,
)  # fmt: skip


@dataclass
class Evidence:
    """One recording of a network, and a second one of a larger batch to tell which axis is the batch.

    Args:
        model: the network, in eval mode.
        recording: of the example input.
        grown: of the example input with one more example, or None when the network cannot run it.
    """

    model: nn.Module
    recording: Recording
    spines: Spines
    grown: Recording | None

    def __post_init__(self) -> None:
        if self.grown is not None:
            refuse_divergence(self.recording.graph, self.grown.graph)

    @cached_property
    def exits(self) -> dict[fx.Node, list[tuple[ModuleCall, Path]]]:
        """For every node the module calls that returned it, and where in their output."""
        found: dict[fx.Node, list[tuple[ModuleCall, Path]]] = {}
        for call in self.recording.calls:
            for path, node in call.outputs:
                found.setdefault(node, []).append((call, path))
        return found

    @cached_property
    def grown_shapes(self) -> dict[fx.Node, tuple[int, ...] | None]:
        if self.grown is None:
            return {}
        pairs = zip(self.recording.graph.nodes, self.grown.graph.nodes, strict=True)
        return {node: twin.meta.get("shape") for node, twin in pairs}

    def times_called(self, path: str, within: ModuleCall) -> int:
        return sum(within.order in call.parents for call in self.recording.calls_of(path))

    def axes(self, node: fx.Node, width: int | None = None) -> Axes:
        """Batch and channel axis of a node's value; `width` settles the channel where the maker does not tell."""
        shape = node.meta["shape"]
        return Axes(self.batch_axis(node), self.channel_axis(node, width) - len(shape))

    def batch_axis(self, node: fx.Node) -> int:
        """The axis that grows with the batch; 0 where the network could not run another batch."""
        shape, grown = node.meta["shape"], self.grown_shapes.get(node)
        moved = [i for i, (a, b) in enumerate(zip(shape, grown, strict=True)) if a != b] if grown else []
        return moved[0] if moved else 0

    def channel_axis(self, node: fx.Node, width: int | None = None) -> int:
        """Index from the front of the axis that weights act along, read off the module that made or reads it."""
        rank = len(node.meta["shape"])
        for neighbour in (node, *node.users):
            module = ops.module_of(neighbour, self.model)
            if isinstance(module, CHANNELS_FIRST):
                return 1
            if module is not None and any(True for _ in module.parameters()):
                return rank - 1
        fits = [i for i in range(rank) if node.meta["shape"][i] == width]
        return fits[-1] if fits else rank - 1


def refuse_divergence(graph: fx.Graph, grown: fx.Graph) -> None:
    """Two batch sizes must take the same path through the network."""
    for node, twin in zip(graph.nodes, grown.nodes, strict=False):
        if (node.op, node.target) != (twin.op, twin.target):
            break
    else:
        if len(graph.nodes) == len(grown.nodes):
            return
        node = list(graph.nodes)[-1]
    raise Refused(
        "another batch size takes another path through the network, which the example input does not cover",
        node=describe(node),
        kind="control-flow",
        hint="make the forward pass independent of the batch size",
    )
