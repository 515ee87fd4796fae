"""All layers run and some of them learn, others every so many updates: BAdam-style blocks, LISA-style samples.

BAdam (Luo, Yu and Li 2024, arXiv 2404.02827) is block coordinate descent: K updates of AdamW with fresh moments train
one block, then the next, from the output to the input. Stem and readout are blocks of their own, as with
`include_embedding` and `include_lm_head` of the package `badam`; between them are the plan's blocks. The package itself
is not used: it cannot resume (neither its place in the order nor its copies are in its state), keeps a second copy of
parameters in 32 bits, and tells layers apart by their names.

LISA (Pan et al. 2024, arXiv 2403.17919) trains stem and readout in every update, and some layers that are drawn
uniformly every K updates: as many as the largest block has. Moments of layers that are not drawn again are dropped.

K is `train.steps_per_turn`. Parameters that do not learn take no gradient, so that the backward pass of BAdam ends at
its block. There are as many updates as of end-to-end training, on the same batches and at the same learning rates.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from dbconvert.data.batches import derive
from dbconvert.engine.block_training import most_layers
from dbconvert.engine.forward_forward import without_readout
from dbconvert.engine.layer_kinds import layer_kinds
from dbconvert.engine.method import Job, Method
from dbconvert.errors import UsageError
from dbconvert.plan import Plan
from dbconvert.recipe import Recipe
from dbconvert.tasks.base import Inputs

Parameters = dict[str, nn.Parameter]


class Turns(Method, ABC):
    """End-to-end training of the original network in which parameters take turns."""

    alone = True

    def refuse(self, plan: Plan, recipe: Recipe) -> None:
        if len(plan.blocks) == 1:
            raise UsageError(
                f"train.method={self.name} trains a block's layers at a time, and the network is one block",
                hint="cut it into more blocks, or use train.method=end-to-end",
            )

    @abstractmethod
    def turn(self, job: Job, block: int, number: int) -> Parameters:
        """What learns in a turn."""

    def begin(self, job: Job, block: int) -> None:
        unit, every = job.units[block], job.recipe.train.steps_per_turn
        learning = self.turn(job, block, unit.done // every)
        only(unit.parameters, learning)
        if unit.done % every == 0:
            for key in unit.parameters.keys() - learning.keys():
                unit.optimizer.state.pop(unit.parameters[key], None)

    def passes(self, job: Job, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor) -> list[Callable[[], Tensor]]:
        def lone(learning: Parameters) -> Tensor:
            only(job.units[block].parameters, learning)
            return self.losses(job, job.network, block, inputs, labels, sigma)[0]

        return [partial(lone, learning) for learning in self.turns(job, block)]


class BAdam(Turns):
    """BAdam-style block coordinate descent."""

    name = "badam"

    def turn(self, job: Job, block: int, number: int) -> Parameters:
        sets = self.turns(job, block)
        return sets[number % len(sets)]

    def turns(self, job: Job, block: int) -> list[Parameters]:
        plan, parameters = job.network.plan, job.units[block].parameters
        around = {key: p for key, p in parameters.items() if plan.anatomy.layer_of(key) is None}
        stem = without_readout(plan, around)
        readout = {key: p for key, p in around.items() if key not in stem}
        blocks = [{k: p for k, p in parameters.items() if plan.block_of_key(k) == b} for b in range(len(plan.blocks))]
        return [one for one in (readout, *reversed(blocks), stem) if one]


class LISA(Turns):
    """LISA-style sampling of layers."""

    name = "lisa"

    def turn(self, job: Job, block: int, number: int) -> Parameters:
        return self.learning(job, block, self.drawn(job, number))

    def turns(self, job: Job, block: int) -> list[Parameters]:
        """One draw of each kind: layers that are alike hold alike, wherever they are."""
        kinds = layer_kinds(job.network.model, job.network.plan.anatomy)
        draws = (self.drawn(job, number) for number in range(-(-job.steps // job.recipe.train.steps_per_turn)))
        alike = {tuple(sorted(kinds[layer] for layer in layers)): layers for layers in draws}
        return [self.learning(job, block, layers) for layers in alike.values()]

    def drawn(self, job: Job, number: int) -> list[int]:
        """The layers of a turn."""
        plan, chance = job.network.plan, random.Random(derive(job.recipe.seed, "lisa", number))
        return chance.sample(range(plan.anatomy.depth), most_layers(plan))

    def learning(self, job: Job, block: int, layers: list[int]) -> Parameters:
        anatomy = job.network.plan.anatomy
        return {k: p for k, p in job.units[block].parameters.items() if anatomy.layer_of(k) in (None, *layers)}


def only(parameters: Mapping[str, nn.Parameter], learning: Mapping[str, nn.Parameter]) -> None:
    """Of these parameters the others take no gradient."""
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in learning)
