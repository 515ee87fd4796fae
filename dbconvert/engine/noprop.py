"""NoProp-DT (Li, Teh and Pascanu 2025, arXiv 2503.24322): blocks that each denoise the label at one fixed level.

Block t of T = B sees x and z_{t-1} and predicts the embedding u_y of the label, as the expected row of the table under
the softmax of its scores. z_t is variance preserving, q(z_t|y) = N(sqrt(abar_t) u_y, 1 - abar_t) (Eq. 6), where abar_t
is the product of alpha_t to alpha_T. The loss of block t is its term of Eq. 8,
T/2 eta (SNR(t) - SNR(t-1)) |u_t(z_{t-1}, x) - u_y|^2 with SNR = abar/(1 - abar) and z_{t-1} drawn from q. A prediction
starts from z_0 ~ N(0, 1) and goes z_t = a_t u_t(z_{t-1}, x) + b_t z_{t-1} + sqrt(c_t) eps (Eq. 3), with a_t, b_t and
c_t of the posterior q(z_t|z_{t-1}, y) and u_t in the place of u_y; or, without noise, from z_0 = 0 along the means.

Chosen where the paper leaves it open: the cosine is that of Nichol and Dhariwal (2021, Eq. 17) with s = 0.008, not
divided by its value at the clean end, so that abar_0 = 0 and SNR(T) is finite. The table is fixed, its rows random and
of norm 1. With it the other two terms of Eq. 8 do not depend on the blocks: the divergence of z_0 is 0, and the
classifier of z_T that makes its cross-entropy least is the posterior of the classes under q(z_T|y), which is used as it
is, without weights of its own. Every block has a copy of stem and readout, so that nothing is shared in training; one
update trains one block. Levels are not embedded: a block knows a single one. eta is 0.1; AdamW does not see the factors
of a block's loss, but `train.clip` does, and shortens nearly every gradient of the last block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.engine.block_training import most_layers
from dbconvert.engine.method import Forward, Job, Method, Trained, trainable
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.units import Unit
from dbconvert.graph.inject import PREFIX
from dbconvert.plan import Plan
from dbconvert.recipe import Recipe
from dbconvert.tasks.base import Inputs, Task

ETA = 0.1
OFFSET = 0.008
"""s of the cosine."""


class NoPropDT(Method):
    """Blocks of the original network with a stem and a readout each, one an update."""

    name = "noprop-dt"
    labelled = True
    alone = True
    stepwise = True
    prepared = False

    def apart(self, recipe: Recipe) -> bool:
        return True

    def settle(self, network: BlockwiseNetwork, recipe: Recipe) -> None:
        network.predict, network.walk = predict, walk

    def trained(self, network: BlockwiseNetwork, recipe: Recipe, steps: int) -> Trained:
        units = {
            b: Unit(f"block-{b}", trainable(learning(network, b)), recipe.optimizer, steps) for b in network.present
        }
        return Trained(units, None, steps)

    def losses(
        self, job: Job, forward: Forward, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        return losses(job.network, block, inputs, labels), sigma

    def held(self, network: BlockwiseNetwork) -> Iterable[nn.Parameter]:
        return [p for block in network.present for p in trainable(learning(network, block)).values()]

    def active(self, job: Job, block: int) -> range:
        return job.network.plan.layers_of(block)

    def layer_calls(self, plan: Plan) -> int:
        return most_layers(plan)

    def evaluations(self, task: Task, plan: Plan, recipe: Recipe) -> int:
        return len(plan.blocks)


# -- the schedule: t counts from 0, which is noise, to T = `blocks` ---------------------------------------------


def kept(t: int, blocks: int) -> float:
    """abar_t, the share of the variance of z_t that is not noise."""
    return math.cos((1 - t / blocks + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2


def signal_to_noise(t: int, blocks: int) -> float:
    return kept(t, blocks) / (1 - kept(t, blocks))


def coefficients(t: int, blocks: int) -> tuple[float, float, float]:
    """a_t, b_t and c_t of the step from z_{t-1} to z_t (between Eq. 6 and 7)."""
    before, after = kept(t - 1, blocks), kept(t, blocks)
    alpha = before / after
    a = math.sqrt(after) * (1 - alpha) / (1 - before)
    b = math.sqrt(alpha) * (1 - after) / (1 - before)
    return a, b, (1 - after) * (1 - alpha) / (1 - before)


# -- training ---------------------------------------------------------------------------------------------------


def losses(network: BlockwiseNetwork, block: int, inputs: Inputs, labels: Tensor) -> Tensor:
    """The term of Eq. 8 that a block has, block 0 being t = 1, with one draw of z_{t-1}, [N]."""
    blocks, task = len(network.plan.blocks), network.task
    clean = task.clean(network.model, labels)
    share = kept(block, blocks)
    z = math.sqrt(share) * clean + math.sqrt(1 - share) * task.draw(inputs, device=labels.device)
    expected = task.denoised(network.model, predicted(network, block, inputs, z))
    weight = blocks / 2 * ETA * (signal_to_noise(block + 1, blocks) - signal_to_noise(block, blocks))
    return weight * (expected - clean).square().sum(-1)


def learning(network: BlockwiseNetwork, block: int) -> dict[str, Tensor]:
    """What a block learns: its layers, and its own stem and readout; nothing that is told a level."""
    own = f"{PREFIX}.periphery."
    tensors = network.block_tensors(block)
    return {k: v for k, v in tensors.items() if k.startswith(own) or not k.startswith(PREFIX + ".")}


def predicted(network: BlockwiseNetwork, block: int, inputs: Inputs, z: Tensor) -> Tensor:
    """Scores of one block, unconditioned, [N, K].

    Args:
        z: [N, d], enters as it is.
    """
    level = torch.ones(len(z), device=z.device)
    as_it_is = replace(network.corrupted(block, z, level), sigma=0 * level, scaling=Preconditioning(1.0))
    passage = replace(network.task.passage(network.model, block, inputs, as_it_is), condition=None, exit=None)
    network.run.reset()
    network.run.active = network.plan.layers_of(block)
    passage.steer(network.run)
    return network.output(network.call(block, passage))


# -- inference --------------------------------------------------------------------------------------------------


@torch.no_grad()
def walk(network: BlockwiseNetwork, inputs: Inputs, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Log-probabilities of the classes, but for a constant, given z_t, after each of the T steps, [N, K].

    Args:
        generator: of z_0 and of the noise of every step; None takes their means, 0.
    """
    blocks, task, table = len(network.plan.blocks), network.task, network.task.table(network.model)
    shape = task.target_shape(inputs)

    def noise() -> Tensor:
        drawn = torch.zeros(shape) if generator is None else torch.randn(shape, generator=generator)
        return drawn.to(table.device)

    z = noise()
    for block in range(blocks):
        a, b, c = coefficients(block + 1, blocks)
        expected = task.denoised(network.model, predicted(network, block, inputs, z))
        z = a * expected + b * z + math.sqrt(c) * noise()
        share = kept(block + 1, blocks)
        yield math.sqrt(share) / (1 - share) * z @ table.T


def predict(network: BlockwiseNetwork, inputs: Inputs) -> Tensor:
    """Those after the last step, without noise."""
    *_, last = walk(network, inputs)
    return last
