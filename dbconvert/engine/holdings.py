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
"""Bytes of a parameter, a gradient and a moment: weights and their state are kept in 32 bits, in bf16 training too."""


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
    """Some parameters, all of them trained."""

    elements: int = 0
    state: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.elements + other.elements, self.state + other.state)

    def __mul__(self, count: int) -> Weights:
        return Weights(self.elements * count, self.state * count)


def weights(parameters: Iterable[Tensor], optimizer: OptimizerName) -> Weights:
    unique = {id(p): p for p in parameters if p.is_floating_point()}.values()
    return Weights(sum(p.numel() for p in unique), sum(state_size(p.numel(), optimizer) for p in unique))


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


def inventory(network: BlockwiseNetwork, optimizer: OptimizerName) -> Inventory:
    """Counts a network that was converted as one block of all layers."""
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
    return Inventory(
        weights(originals, optimizer),
        tuple(weights(found.get(i, []), optimizer) for i in range(anatomy.depth)),
        weights(found.get("each", []), optimizer),
        weights(found.get("periphery", []), optimizer),
        weights(found.get("hearing", []), optimizer),
    )


def holding(resident: Weights, in_use: Weights, activations: int) -> Holding:
    """All that is resident, gradients of what is in use, and activations."""
    return Holding(WORD * resident.elements, WORD * in_use.elements, resident.state, activations)
