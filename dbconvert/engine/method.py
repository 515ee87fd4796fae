"""A form of training: what of a network a run trains, what an update computes, and what of it is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dbconvert.data.batches import Data
from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.engine.mover import Mover
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.units import Unit
from dbconvert.plan import NoiseFit, Plan
from dbconvert.recipe import Recipe
from dbconvert.tasks.base import Inputs, Task, along

BASELINE = 0
"""The one `block` of a baseline's order."""
Forward = Callable[..., Tensor]
"""`BlockwiseNetwork.forward`, of the network itself or as accelerate prepared it."""


class States(Protocol):
    """What earlier blocks bring to a block, by example."""

    def at(self, index: Tensor, device: torch.device, batch_axis: int) -> tuple[Tensor, Tensor | None]:
        """z and what is heard of the examples of these numbers."""


@dataclass
class Job:
    """What a loop works on.

    Args:
        noise: the noise in force.
        layers: for a baseline, the layers that run unconditioned; None trains blocks.
        units: by block; a baseline has one, but for NoProp-DT, which has blocks too.
        periphery: the unit that every block trains too, None where blocks have their own.
        steps: updates a block.
        mover: of blocks that are not always on the device; None leaves all of them there.
        states: what earlier blocks bring to the one that is trained, where that is kept.
    """

    method: Method
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
    mover: Mover | None = None
    states: States | None = None

    @property
    def intervals(self) -> Intervals:
        return self.noise.intervals()

    @property
    def stagewise(self) -> bool:
        """Whether the shared periphery stays as the first block's training leaves it."""
        return self.recipe.train.order == "stagewise" and self.method.blocks

    def units_of(self, block: int) -> list[Unit]:
        """What an update of a block changes; all else of it has no gradient from here on."""
        shared = self.periphery is not None and not (self.stagewise and block != min(self.units))
        if self.periphery is None:
            return [self.units[block]]
        for parameter in self.periphery.parameters.values():
            parameter.requires_grad_(shared)
        return [self.units[block], *([self.periphery] if shared else [])]

    def all_units(self) -> list[Unit]:
        return [*self.units.values(), *([self.periphery] if self.periphery else [])]


@dataclass(frozen=True)
class Trained:
    """What a job trains: units by block, what all of them train too, and updates a block."""

    units: dict[int, Unit]
    periphery: Unit | None
    steps: int


class Method:
    """A form of training; as it stands, end-to-end training of some layers of the original network.

    Attributes:
        blocks: it trains converted blocks, which can be put together; all others are baselines.
        labelled: it is for one label an example.
        alone: it runs in one process.
        stepwise: it predicts in steps, a block each, so that its figures are those of blocks.
        prepared: its passes go through the network's own forward, as accelerate prepares it.
    """

    name: str
    blocks = False
    labelled = False
    alone = False
    stepwise = False
    prepared = True

    # -- what it trains -----------------------------------------------------------------------------------

    def refuse(self, plan: Plan, recipe: Recipe) -> None:
        """Raises UsageError for what cannot be trained like this."""

    def apart(self, recipe: Recipe) -> bool:
        """Whether each block has a stem and a readout of its own."""
        return False

    def layers(self, plan: Plan) -> range | None:
        """The layers that run unconditioned; None where blocks run."""
        return range(plan.anatomy.depth)

    def settle(self, network: BlockwiseNetwork, recipe: Recipe) -> None:
        """Changes how a network runs and predicts, for training and for use.

        Raises:
            UsageError: this network cannot run like this.
        """

    def pace(self, plan: Plan) -> int:
        """Updates for one of a block."""
        return 1

    def trained(self, network: BlockwiseNetwork, recipe: Recipe, steps: int) -> Trained:
        """Args: steps: that the recipe gives a block."""
        pace = self.pace(network.plan)
        unit = Unit("network", self.parameters(network), recipe.optimizer, steps * pace, pace)
        return Trained({BASELINE: unit}, None, steps * pace)

    def parameters(self, network: BlockwiseNetwork) -> dict[str, nn.Parameter]:
        """Of a baseline: those of the original network that its layers, stem and readout have."""
        layers = self.layers(network.plan)
        return baseline_parameters(network, range(0) if layers is None else layers)

    def finish(self, network: BlockwiseNetwork) -> None:
        """Once trained, before the weights are written: leaves the parameters that the network had."""

    # -- an update ----------------------------------------------------------------------------------------

    def begin(self, job: Job, block: int) -> None:
        """Before an update of a block: says what it trains, where that changes."""

    def levels(self, job: Job, block: int, labels: Tensor, uniform: Tensor) -> Tensor:
        """sigma of a batch, [N] or [N, S], from numbers in [0, 1) of that shape; 0 where there is no noise."""
        if not job.network.task.denoiser:
            return torch.zeros(len(labels))
        return job.intervals.whole().draw(block, uniform)

    def losses(
        self, job: Job, forward: Forward, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Unweighted losses, of the labels' shape, and the levels that they belong to."""
        task = job.network.task
        eps = task.draw(inputs, device=labels.device) if task.denoiser else None
        return forward(None, inputs, labels, sigma, eps, layers=job.layers), sigma

    def weight(self, job: Job, sigma: Tensor) -> Tensor | None:
        """Of losses at these levels; None where they count as they are."""
        return noise_weight(job, sigma) if job.network.task.denoiser else None

    def learn(
        self,
        job: Job,
        forward: Forward,
        block: int,
        inputs: Inputs,
        labels: Tensor,
        sigma: Tensor,
        backward: Callable[[Tensor], None],
    ) -> Tensor:
        """Accumulates the gradients of a part of a batch; returns its unweighted losses.

        Args:
            backward: is given sums of weighted losses.
        """
        losses, level = self.losses(job, forward, block, inputs, labels, sigma)
        weight = self.weight(job, level)
        weighted = losses if weight is None else losses * along(weight, losses)
        backward((weighted * job.network.task.counted(labels)).sum())
        return losses.detach()

    # -- what it counts -----------------------------------------------------------------------------------

    def passes(self, job: Job, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor) -> list[Callable[[], Tensor]]:
        """The forward passes of an update, of which the activations of one at a time are kept."""
        return [lambda: self.losses(job, job.network, block, inputs, labels, sigma)[0]]

    def turns(self, job: Job, block: int) -> list[dict[str, nn.Parameter]]:
        """The parameters that an update trains: one of these sets."""
        return [job.units[block].parameters]

    def held(self, network: BlockwiseNetwork) -> Iterable[nn.Parameter]:
        """The parameters that are there for training; a baseline needs nothing of the blocks."""
        layers = self.layers(network.plan)
        return baseline_parameters(network, range(0) if layers is None else layers).values()

    def active(self, job: Job, block: int) -> range:
        """The layers that run in an update."""
        return job.network.plan.layers_of(block) if job.layers is None else job.layers

    def layer_calls(self, plan: Plan) -> int:
        """Layers that run in an update, the most over blocks."""
        return plan.anatomy.depth * plan.anatomy.calls

    def forward_layers(self, task: Task, plan: Plan, recipe: Recipe) -> float:
        """Layers that run without gradient in an update, the mean over all updates."""
        return 0.0

    def evaluations(self, task: Task, plan: Plan, recipe: Recipe) -> int:
        """Network evaluations of a prediction ; of a block where blocks run."""
        return 1


def noise_weight(job: Job, sigma: Tensor) -> Tensor | None:
    """w(sigma) of EDM where the recipe or the task asks for it."""
    if (job.recipe.train.weight or job.network.task.weight) == "none":
        return None
    return Preconditioning(job.network.sigma_data).weight(sigma)


# -- parameters -------------------------------------------------------------------------------------------------


def baseline_parameters(network: BlockwiseNetwork, layers: range) -> dict[str, nn.Parameter]:
    """Parameters of the original network that a baseline trains."""
    anatomy = network.plan.anatomy
    originals = {k: v for k, v in network.tensors().items() if not k.startswith("dbconvert.")}
    return {
        key: value
        for key, value in trainable(originals).items()
        if anatomy.layer_of(key) is None or anatomy.layer_of(key) in layers
    }


def trainable(tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    return {k: v for k, v in tensors.items() if isinstance(v, nn.Parameter) and v.is_floating_point()}
