"""The recordings that an analysis reads, with the questions it asks of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import fx, nn

from dbconvert.anatomy import Axes
from dbconvert.errors import Refused
from dbconvert.graph import ops
from dbconvert.graph.continued import with_continued
from dbconvert.graph.spine import Spines
from dbconvert.graph.stack import Stack, find_stacks
from dbconvert.graph.tape import ModuleCall, Path, Recording, describe

CHANNELS_LAST = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm,
)  # fmt: skip
STEPS = 4
"""How many views, activations and sums away from a value its channel axis is looked for."""


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

    @cached_property
    def stacks(self) -> list[Stack]:
        """All stacks, most work first."""
        return with_continued(find_stacks(self.recording, self.spines), self.recording, self.spines)

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
        twins = numbered(self.grown.graph.nodes)
        return {
            n: twins[key].meta.get("shape") for key, n in numbered(self.recording.graph.nodes).items() if key in twins
        }

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
        """Index from the front of the axis that weights act along, read off the modules that made or read the value.

        torch's own modules tell it by their kind, also through views; others by the shape of their weights.
        """
        rank = len(node.meta["shape"])
        for told in (self.axis_by_kind(node), self.axis_by_weights(node)):
            if told is not None:
                return told
        fits = [i for i in range(rank) if node.meta["shape"][i] == width]
        return fits[-1] if fits else rank - 1

    def axis_by_kind(self, node: fx.Node, steps: int = STEPS) -> int | None:
        """What torch's own modules say of a value, of what it is a view of, or of what views, activations, paddings
        and sums make of it."""
        for neighbour in (node, *readers(node)):
            told = self.axis_of_kind(neighbour, node)
            if told is not None:
                return told
        for user in node.users if steps else ():
            view = ops.unchanged(user) is node
            if view or ops.is_activation(user, self.model) or ops.is_addition(user) or ops.is_padding(user):
                passes = view or ops.same_shape(user, node) or ops.is_padding(user)
                told = self.axis_by_kind(user, steps - 1) if passes else None
                axis = ops.axis_before(user, told) if view and told is not None else told
                if axis is not None:
                    return axis
        return self.axis_before_view(node)

    def axis_of_kind(self, neighbour: fx.Node, node: fx.Node) -> int | None:
        """What a module that makes or reads `node`, or makes what is added to another term, says by its class."""
        terms = ops.operands(neighbour) if ops.is_addition(neighbour) and ops.same_shape(neighbour, node) else []
        for made in (neighbour, *(term for term in terms if ops.same_shape(term, node))):
            module = ops.module_of(made, self.model)
            if runs_as(module, CHANNELS_FIRST):
                return 1
            if runs_as(module, CHANNELS_LAST) and len(getattr(module, "normalized_shape", [1])) == 1:
                return len(node.meta["shape"]) - 1
        return None

    def axis_before_view(self, node: fx.Node) -> int | None:
        """What the module says that made what this value is a view of."""
        source = ops.unchanged(node)
        told = None if source is None or node.op != "call_function" else self.axis_of_kind(source, source)
        fits = [] if told is None else [i for i in range(len(node.meta["shape"])) if ops.axis_before(node, i) == told]
        return fits[0] if len(fits) == 1 else None

    def axis_by_weights(self, node: fx.Node) -> int | None:
        """The only axis, but for the batch, that has the size of the vectors among a module's weights."""
        shape = node.meta["shape"]
        for neighbour in (node, *readers(node)):
            module = ops.module_of(neighbour, self.model)
            vectors = [] if module is None else [p for p in module.parameters() if sum(n > 1 for n in p.shape) == 1]
            sizes = {vector.numel() for vector in vectors}
            fits = [i for i, n in enumerate(shape) if n in sizes and i != self.batch_axis(node)]
            if len(fits) == 1:
                return fits[0]
        return None


def runs_as(module: nn.Module | None, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is one of torch's and computes as torch does: subclasses with a forward of their own do not."""
    return any(isinstance(module, cls) and type(module).forward is cls.forward for cls in classes)


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes whose first argument is this one."""
    return [user for user in node.users if ops.first(user) is node]


def numbered(nodes: Iterable[fx.Node]) -> dict[tuple[object, ...], fx.Node]:
    """Nodes by what they do, where, and how often that was done there before: the same in another recording, as long
    as both take the same path through that module."""
    seen: Counter[tuple[object, ...]] = Counter()
    found: dict[tuple[object, ...], fx.Node] = {}
    for node in nodes:
        does = (node.op, str(node.target), node.meta.get("scope"))
        found[*does, seen[does]] = node
        seen[does] += 1
    return found


def refuse_divergence(evidence: Evidence, orders: set[int]) -> None:
    """Two batch sizes must take the same path through the layers, the calls of these orders."""
    if evidence.grown is None:
        return
    before, after = (
        [node for node in recording.graph.nodes if orders & set(node.meta.get("calls", ()))]
        for recording in (evidence.recording, evidence.grown)
    )
    differing = [n for n, twin in zip(before, after, strict=False) if (n.op, n.target) != (twin.op, twin.target)]
    if differing or len(before) != len(after):
        raise Refused(
            "another batch size takes another path through the network, which the example input does not cover",
            node=describe(differing[0] if differing else before[-1]),
            kind="control-flow",
            hint="make the forward pass independent of the batch size",
        )
