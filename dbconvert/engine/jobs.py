"""What a training loop works on: the network, its units, its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dbconvert.data.batches import Data
from dbconvert.diffusion.intervals import Intervals
from dbconvert.engine.forward_forward import scores
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.noprop import learning, predict, walk
from dbconvert.engine.units import Unit
from dbconvert.errors import UsageError
from dbconvert.plan import NoiseFit, Plan
from dbconvert.recipe import BACKPROPAGATE, Recipe

BASELINE = 0
"""The one `block` of a baseline's order."""


@dataclass
class Job:
    """What a loop works on.

    Args:
        noise: the noise in force.
        layers: for a baseline, the layers that run unconditioned; None trains blocks.
        units: by block; a baseline has one, but for NoProp-DT, which has blocks too.
        periphery: the unit that every block trains too, None where blocks have their own.
        steps: updates a block.
    """

    network: BlockwiseNetwork
    noise: NoiseFit
    layers: range | None
    units: dict[int, Unit]
    periphery: Unit | None
    steps: int
    examples: Data
    validation: Data | None
    recipe: Recipe
    folder: Path

    @property
    def intervals(self) -> Intervals:
        return self.noise.intervals()

    def all_units(self) -> list[Unit]:
        return [*self.units.values(), *([self.periphery] if self.periphery else [])]


def make_job(
    network: BlockwiseNetwork,
    noise: NoiseFit,
    recipe: Recipe,
    steps: int,
    examples: Data,
    validation: Data | None,
    folder: Path,
) -> Job:
    blocks = len(network.plan.blocks)
    layers = baseline_layers(network.plan, recipe)
    set_baseline(network, recipe)
    periphery = None
    if recipe.train.method == "noprop-dt":
        units = {
            b: Unit(f"block-{b}", trainable(learning(network, b)), recipe.optimizer, steps) for b in network.present
        }
    elif layers is not None:
        pace = blocks if recipe.train.method == "shallow" else 1
        steps = steps * pace
        parameters = baseline_parameters(network, layers)
        if recipe.train.method == "forward-forward":
            parameters = without_readout(network.plan, parameters)
        units = {BASELINE: Unit("network", parameters, recipe.optimizer, steps, pace)}
    else:
        units = {
            b: Unit(f"block-{b}", trainable(network.block_tensors(b)), recipe.optimizer, steps) for b in network.present
        }
        shared = trainable(network.periphery_tensors()) if network.periphery == "shared" else {}
        periphery = Unit("periphery", shared, recipe.optimizer, steps * blocks, blocks) if shared else None
    freeze_all_but(network, [*units.values(), *([periphery] if periphery else [])])
    return Job(network, noise, layers, units, periphery, steps, examples, validation, recipe, folder)


def baseline_layers(plan: Plan, recipe: Recipe) -> range | None:
    """The layers that a baseline runs: all, or the first block's; None for training in blocks."""
    if recipe.train.method == "blocks":
        return None
    return plan.layers_of(0) if recipe.train.method == "shallow" else range(plan.anatomy.depth)


def set_baseline(network: BlockwiseNetwork, recipe: Recipe) -> None:
    """What a baseline does otherwise: Forward-Forward predicts by goodness, NoProp-DT by steps of its own, the shallow
    control runs a looped core once, truncated backpropagation goes back through its last rounds.

    Raises:
        UsageError: there is no such core, or it has fewer rounds than asked for.
    """
    train, anatomy = recipe.train, network.plan.anatomy
    looped = network.plan.target is not None and network.plan.target.loop is not None
    if train.method == "forward-forward":
        network.predict = scores
    if train.method == "noprop-dt":
        network.predict, network.walk = predict, walk
    if train.method == "shallow" and looped:
        network.rounds = 1
    if train.method != "truncated-bptt":
        return
    if not looped:
        raise UsageError(
            "train.method=truncated-bptt is for networks whose layers run again and again",
            hint="use train.method=end-to-end",
        )
    if (train.backpropagate or 0) > anatomy.calls:
        raise UsageError(
            f"train.backpropagate={train.backpropagate}, and the core runs {anatomy.calls} times",
            hint=f"at most {anatomy.calls}, which is train.method=end-to-end",
        )
    network.backpropagate = train.backpropagate or min(BACKPROPAGATE, anatomy.calls)


def baseline_parameters(network: BlockwiseNetwork, layers: range) -> dict[str, nn.Parameter]:
    """Parameters of the original network that a baseline trains."""
    anatomy = network.plan.anatomy
    originals = {k: v for k, v in network.tensors().items() if not k.startswith("dbconvert.")}
    return {
        key: value
        for key, value in trainable(originals).items()
        if anatomy.layer_of(key) is None or anatomy.layer_of(key) in layers
    }


def without_readout(plan: Plan, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of stem and layers: no layer learns from what comes after it."""
    after = tuple(name + "." for name in plan.anatomy.readout.modules if name and name not in plan.anatomy.stem.modules)
    return {key: value for key, value in parameters.items() if not key.startswith(after)}


def trainable(tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    return {k: v for k, v in tensors.items() if isinstance(v, nn.Parameter) and v.is_floating_point()}


def freeze_all_but(network: BlockwiseNetwork, units: list[Unit]) -> None:
    trained = {id(p) for unit in units for p in unit.parameters.values()}
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) in trained)
