"""What an update holds on the device beside activations: parameters, gradients and optimiser state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from dbconvert.engine.listening import CONTEXT
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.optimizers import state_size
from dbconvert.graph.inject import PREFIX
from dbconvert.recipe import OptimizerName

WORD = 4
"""Bytes of a parameter, a gradient and a moment: weights and their state are kept in 32 bits, unless a run asks for
`bf16-true`."""


@dataclass(frozen=True)
class Holding:
    """Bytes by what they are for."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Weights:
    """Some parameters, all of them trained, in bytes.

    Args:
        state: of the optimiser.
        largest: of the largest of them.
    """

    size: int = 0
    state: int = 0
    largest: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.size + other.size, self.state + other.state, max(self.largest, other.largest))

    def __mul__(self, count: int) -> Weights:
        return Weights(self.size * count, self.state * count, self.largest * (count > 0))


def weights(parameters: Iterable[Tensor], optimizer: OptimizerName, word: int) -> Weights:
    counts = [p.numel() for p in {id(p): p for p in parameters if p.is_floating_point()}.values()]
    return Weights(
        word * sum(counts), sum(state_size(count, optimizer, word) for count in counts), word * max(counts, default=0)
    )


@dataclass(frozen=True)
class Inventory:
    """The weights of a converted network by who trains them.

    Args:
        originals: the network before conversion.
        layers: each layer with its modulation.
        each: what every block has beside its layers: its noise embedder, and its part of the task.
        hearing: what every block but the first one listens with.
        periphery: stem, readout and targets, which every block trains.
    """

    originals: Weights
    layers: tuple[Weights, ...]
    each: Weights
    periphery: Weights
    hearing: Weights

    def block(self, first: int, last: int) -> Weights:
        own = sum(self.layers[first : last + 1], Weights()) + self.each
        return own + self.hearing if first else own

    def in_use(self, first: int, last: int) -> Weights:
        return self.block(first, last) + self.periphery

    def all_blocks(self, count: int) -> Weights:
        return sum(self.layers, Weights()) + self.each * count + self.periphery + self.hearing * (count - 1)


def inventory(network: BlockwiseNetwork, optimizer: OptimizerName, word: int = WORD) -> Inventory:
    """Counts a network that was converted as one block of all layers.

    Args:
        word: bytes of a number that is trained.
    """
    anatomy = network.plan.anatomy
    found: dict[int | str, list[nn.Parameter]] = {}
    originals = []
    for key, parameter in network.model.named_parameters():
        own = key.startswith(PREFIX + ".")
        part, _, rest = key.removeprefix(PREFIX + ".").partition(".")
        if own and part == "modulation":
            home: int | str = int(rest.partition(".")[0])
        elif own and part == CONTEXT:
            home = "hearing"
        elif own:
            home = "each" if network.owner(key) is not None else "periphery"
        else:
            layer = anatomy.layer_of(key)
            home = "periphery" if layer is None else layer
            originals.append(parameter)
        found.setdefault(home, []).append(parameter)

    def counted(home: int | str) -> Weights:
        return weights(found.get(home, []), optimizer, word)

    return Inventory(
        weights(originals, optimizer, word),
        tuple(counted(i) for i in range(anatomy.depth)),
        counted("each"),
        counted("periphery"),
        counted("hearing"),
    )


def holding(resident: Weights, in_use: Weights, activations: int, *, in_backward: bool = False) -> Holding:
    """All that is resident, gradients of what is in use, and activations.

    Args:
        in_backward: each gradient is freed as soon as it is used: the largest counts.
    """
    return Holding(resident.size, in_use.largest if in_backward else in_use.size, resident.state, activations)
