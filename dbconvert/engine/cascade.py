"""What earlier blocks do before one is trained or judged: they run as the sampler runs them, without gradient.

Block k runs at the level of its last evaluation before block k + 1's turn. Its z comes from the truth, in a chain of
noisier and noisier ones that begins at the block in question; or, for some examples of training, from the sampler.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dbconvert.diffusion.intervals import Intervals
from dbconvert.engine.listening import Arrival, put
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.on_policy import Denoised, OwnState, evaluated, met, own_levels, own_state, usual
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.plan import Plan
from dbconvert.recipe import TrainOptions
from dbconvert.tasks.base import Task


@dataclass(frozen=True)
class Cascade:
    """Runs the blocks before one.

    Args:
        own: the examples whose z is the sampler's own, [N] bool; None: of none.
        generator: of draws, on the CPU; None is torch's own.
    """

    intervals: Intervals
    own: Tensor | None = None
    generator: torch.Generator | None = None

    def __call__(self, network: BlockwiseNetwork, block: int, arrival: Arrival, labels: Tensor) -> Arrival:
        """What reaches a block, from what reaches it as the paper has it: the same, with what it hears or on-policy."""
        with at_rest(network):
            if network.plan.context != "raw":
                return self.walk(network, block, arrival, labels, self.own)
            if self.own is None or not self.own.any():
                return arrival
            own = self.own  # where nothing is heard, the other examples need no earlier block
            some = arrival.some(own, network.plan.anatomy.axes)
            found = self.walk(network, block, some, labels[own], own[own])
            inputs = {name: put(value, own, found.inputs[name]) for name, value in arrival.inputs.items()}
            return Arrival(inputs, put(arrival.z, own, found.z), put(arrival.sigma, own, found.sigma))

    def walk(
        self, network: BlockwiseNetwork, block: int, arrival: Arrival, labels: Tensor, own: Tensor | None
    ) -> Arrival:
        """The same with every earlier block that has to run."""
        context = network.plan.context
        state = None if own is None else own_state(network.task)(network, self.intervals, block, own, self.generator)
        chain = self.noisier(network, block, arrival, labels, state)
        heard = None
        for k in range(0 if state is None or context != "raw" else state.first, block):
            here = replace(chain[k], heard=heard)
            here = here if state is None else state.meet(k, here)
            said = evaluated(network, k, here)
            heard = network.delivered(said.expected if context == "estimate" else None, here.z, here.inputs)
            if state is not None:
                state.move(here, said)
        arrival = replace(arrival, heard=heard)
        return arrival if state is None else state.arrive(arrival)

    def noisier(
        self, network: BlockwiseNetwork, block: int, arrival: Arrival, labels: Tensor, state: OwnState | None
    ) -> list[Arrival]:
        """What reaches the blocks before one from the truth, first to last: each less noisy than the one before it."""
        task, chain = network.task, [arrival]
        for k in reversed(range(block)):
            z, sigma = chain[0].z, chain[0].sigma
            level = torch.full_like(sigma, task.handover(self.intervals, k))
            level = level if state is None else state.level(k, level)
            level = torch.maximum(level, sigma)  # overlapping intervals may have drawn a higher one
            draw = task.draw(arrival.inputs, generator=self.generator, device=None if self.generator else z.device)
            noisier = task.noisier(z, sigma, level, draw.to(z.device), labels)
            chain.insert(0, replace(arrival, z=noisier, sigma=level))
        return chain


@contextmanager
def at_rest(network: BlockwiseNetwork) -> Iterator[None]:
    """Eval mode and no gradients meanwhile."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


# -- which examples, and from where -----------------------------------------------------------------------------


def approach(
    network: BlockwiseNetwork, intervals: Intervals, block: int, sigma: Tensor, train: TrainOptions
) -> tuple[Tensor, Cascade | None]:
    """The levels of a batch's examples, [N] or [N, S], and what runs before their block; None where nothing does.

    Args:
        sigma: the levels that were drawn; on-policy examples get those at which the sampler meets the block.
    """
    own, z = None, train.z or network.task.zs[0]
    if z != "noised":
        share = 1.0 if z == "on-policy" else train.mixed
        count = int(share * len(sigma) + float(torch.rand(())))
        own = torch.arange(len(sigma), device=sigma.device) < count
        sigma = own_levels(network.task, intervals, block, sigma, own)
    return sigma, Cascade(intervals, own) if own is not None or network.plan.context != "raw" else None


def forward_layers(task: Task, plan: Plan, train: TrainOptions) -> float:
    """Layers of earlier blocks, and of the own one, that run without gradient in an update; the mean over blocks."""
    intervals, total = plan.preview.intervals(), 0.0
    share = {"noised": 0.0, "mixed": train.mixed, "on-policy": 1.0}[train.z or task.zs[0]]
    sizes = [len(plan.layers_of(block)) for block in range(len(plan.blocks))]
    state = own_state(task)
    for block, size in enumerate(sizes):
        first = 0 if state is Denoised else max(0, block - 1)
        total += sum(sizes[:block]) if plan.context != "raw" else share * sum(sizes[first:block])
        if state is Denoised:
            total += share * size * (len(met(usual(task, intervals), intervals, block)) - 1) / 2
    return total / len(sizes)


def noised(network: BlockwiseNetwork, intervals: Intervals, generator: torch.Generator) -> Cascade | None:
    """What runs before a block that is judged: all z come from the truth.

    Raises:
        DBConvertError: earlier blocks would have to run, and are not there.
    """
    if network.plan.context == "raw":
        return None
    if network.present[0] > 0:
        raise DBConvertError(
            f"block {network.present[0]} hears what block {network.present[0] - 1} delivers, which is not there",
            hint="put all blocks together with dbconvert assemble",
        )
    return Cascade(intervals, None, generator)


def refuse_gaps(network: BlockwiseNetwork, intervals: Intervals, grid: list[float]) -> None:
    """Refuses levels to sample at that pass a block over, where the next one wants to hear it.

    Raises:
        UsageError: they do.
    """
    run = {intervals.block_of(level) for level in grid}
    silent = [b for b in range(intervals.blocks) if b not in run]
    if network.plan.context != "raw" and silent:
        raise UsageError(
            f"{len(grid)} steps leave out block {silent[0]}, and each block hears the one before it",
            hint="take more steps, or the default",
        )
