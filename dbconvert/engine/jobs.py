"""What a training loop works on, made from a recipe: the network, its units, its data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dbconvert.data.batches import Data
from dbconvert.engine.method import Job, Method
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.units import Unit
from dbconvert.plan import NoiseFit
from dbconvert.recipe import Recipe


def make_job(
    method: Method,
    network: BlockwiseNetwork,
    noise: NoiseFit,
    recipe: Recipe,
    steps: int,
    examples: Data,
    validation: Data | None,
    folder: Path,
    only: int | None = None,
) -> Job:
    """Args: only: the block that is trained, where others are there for what they deliver."""
    if recipe.train.precision == "bf16-true":
        keep_in_bf16(network)
    method.settle(network, recipe)
    made = method.trained(network, recipe, steps)
    if only is not None:
        made = replace(made, units={only: made.units[only]})
    freeze_all_but(network, [*made.units.values(), *([made.periphery] if made.periphery else [])])
    layers = method.layers(network.plan)
    return Job(
        method, network, noise, layers, made.units, made.periphery, made.steps, examples, validation, recipe, folder
    )


def keep_in_bf16(network: BlockwiseNetwork) -> None:
    """Parameters only: what buffers hold, rotary frequencies above all, needs its digits."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()


def freeze_all_but(network: BlockwiseNetwork, units: list[Unit]) -> None:
    trained = {id(p) for unit in units for p in unit.parameters.values()}
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) in trained)
