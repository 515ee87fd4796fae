"""Training in blocks: each denoises at its own levels, alone or with the periphery that all share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from dbconvert.engine.cascade import approach, forward_layers
from dbconvert.engine.kept_states import instead
from dbconvert.engine.method import Forward, Job, Method, Trained, noise_weight, trainable
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.units import Unit
from dbconvert.plan import Plan
from dbconvert.recipe import Recipe
from dbconvert.tasks.base import Inputs, Task


class Blocks(Method):
    """DiffusionBlocks."""

    name = "blocks"
    blocks = True
    stepwise = True

    def apart(self, recipe: Recipe) -> bool:
        return recipe.train.periphery == "frozen-target"

    def layers(self, plan: Plan) -> None:
        return None

    def trained(self, network: BlockwiseNetwork, recipe: Recipe, steps: int) -> Trained:
        blocks, options = len(network.plan.blocks), recipe.optimizer
        units = {b: Unit(f"block-{b}", trainable(network.block_tensors(b)), options, steps) for b in network.present}
        shared = trainable(network.periphery_tensors()) if network.periphery == "shared" else {}
        pace = 1 if recipe.train.order == "stagewise" else blocks
        periphery = Unit("periphery", shared, options, steps * pace, pace) if shared else None
        return Trained(units, periphery, steps)

    def levels(self, job: Job, block: int, labels: Tensor, uniform: Tensor) -> Tensor:
        return job.intervals.draw(block, uniform)

    def losses(
        self, job: Job, forward: Forward, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        eps = job.network.task.draw(inputs, device=labels.device)
        sigma, before = approach(job.network, job.intervals, block, sigma, job.recipe.train)
        before, inputs = instead(job, before, inputs)
        return forward(block, inputs, labels, sigma, eps, before=before), sigma

    def weight(self, job: Job, sigma: Tensor) -> Tensor | None:
        return noise_weight(job, sigma)

    def held(self, network: BlockwiseNetwork) -> Iterable[nn.Parameter]:
        return network.parameters()

    def layer_calls(self, plan: Plan) -> int:
        return most_layers(plan)

    def forward_layers(self, task: Task, plan: Plan, recipe: Recipe) -> float:
        return forward_layers(task, plan, recipe.train)

    def evaluations(self, task: Task, plan: Plan, recipe: Recipe) -> int:
        return recipe.eval.steps or task.evaluations or len(plan.blocks) + 1


def most_layers(plan: Plan) -> int:
    """Of the largest block."""
    return max(len(plan.layers_of(block)) for block in range(len(plan.blocks)))
