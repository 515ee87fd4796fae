"""How well a network that denoises tokens knows a text: a bound of its likelihood from denoising errors (I-MMSE).

    -ln p(y | x) <=  E |y - D(0, sigma_max)|^2 / (2 sigma_max^2)
                   + integral over ln sigma of E |y - D(z, sigma)|^2 / sigma^2
                   + E CE(z at sigma_min)

for every token y after its clean prefix x, with D the expected target of the block that owns the level (Guo, Shamai and
Verdu 2005; Kingma et al. 2021 for denoisers that are not perfect). The end terms stand for the levels that no block
serves. Above sigma_max, z is drawn from a normal of deviation sigma_max around D(0, sigma_max), which knows the prefix
only, and the first term is what that costs; D of a noisy z would know of y, and the sum would bound nothing. Below
sigma_min nothing is denoised any more: the token is read off z by the last block's scores.

Where a block hears its predecessor, its D knows a noisier z too, of a path that the true process takes: the reverse
process may look back along its own path, and the sum stays a bound (`evidence.py` says the same of hidden tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dbconvert.diffusion.intervals import Intervals
from dbconvert.engine.cascade import noised
from dbconvert.engine.evidence import bits_per_character, by_block, gathered, mean_and_error, with_interval
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.tasks.base import Inputs

LARGEST = 700
"""Nats whose exponential a float holds."""


@dataclass(frozen=True)
class Bound:
    """Estimates the bound, example by example, without bias.

    Args:
        draws: noisy copies of an example for each block, at a random level in each of as many equal parts, in ln sigma,
            of the interval that the block owns; the overlap of training intervals is left to the owner.
    """

    network: BlockwiseNetwork
    intervals: Intervals
    draws: int
    seed: int

    def measure(
        self, batches: Iterable[tuple[Inputs, Tensor]], characters_per_token: float | None = None
    ) -> dict[str, float]:
        """Figures over all examples; needs all blocks.

        `nats_bound` is a token's, `nats_block_b` block b's share of it, and `perplexity_bound` its exponential, left
        out where no float holds it. `_error` is a standard error over examples and draws, and a 95 % interval goes from
        `_low` to `_high`.
        """
        blocks = list(range(self.intervals.blocks))
        rows, counts = gathered(batches, blocks, self.share, self.network.task.counted, self.seed)
        nats, error = mean_and_error(rows, counts)
        found = with_interval("nats_bound", nats, error)
        bits = {} if characters_per_token is None else bits_per_character(nats, error, characters_per_token)
        return {
            **(by_block(rows, counts, blocks) if len(blocks) > 1 else {}),
            **found,
            **perplexity(found),
            **bits,
        }

    def share(self, block: int, inputs: Inputs, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One block's terms of the bound for each example, in nats, [N] double."""
        low, high = self.intervals.owned(block)
        total = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        for draw in range(self.draws):
            place = (draw + torch.rand(len(labels), generator=generator, dtype=torch.float64)) / self.draws
            sigma = (low * (high / low) ** place).to(labels.device)
            z = self.noisy(inputs, labels, sigma, generator)
            total += self.errors(block, inputs, labels, z, sigma, generator) / sigma.square() * math.log(high / low)
            if block == self.intervals.blocks - 1:
                total += self.readout(block, inputs, labels, low, generator)
        total /= self.draws
        if block == 0:
            sigma = torch.full_like(total, high)
            z = torch.zeros(self.network.task.target_shape(inputs), device=labels.device)
            total += self.errors(block, inputs, labels, z, sigma, generator) / (2 * high**2)
        return total

    def readout(self, block: int, inputs: Inputs, labels: Tensor, level: float, generator: torch.Generator) -> Tensor:
        """Cross-entropies at a level, summed over the positions of one noisy copy of each example, [N] double."""
        sigma = torch.full((len(labels),), level, dtype=torch.float64, device=labels.device)
        z = self.noisy(inputs, labels, sigma, generator)
        before = noised(self.network, self.intervals, generator)
        losses = self.network.told(block, inputs, labels, z, sigma.float(), self.network.task.losses, before)
        return self.summed(losses, labels)

    def errors(
        self, block: int, inputs: Inputs, labels: Tensor, z: Tensor, sigma: Tensor, generator: torch.Generator
    ) -> Tensor:
        """|y - D|^2, summed over positions, [N] double."""
        before = noised(self.network, self.intervals, generator)
        return self.summed(self.network.told(block, inputs, labels, z, sigma.float(), self.apart, before), labels)

    def apart(self, scores: Tensor, labels: Tensor) -> Tensor:
        task, model = self.network.task, self.network.model
        return (task.clean(model, labels) - task.denoised(model, scores)).double().square().sum(-1)

    def summed(self, values: Tensor, labels: Tensor) -> Tensor:
        return (values * self.network.task.counted(labels)).sum(-1).double()

    def noisy(self, inputs: Inputs, labels: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
        task = self.network.task
        eps = task.draw(inputs, generator=generator).to(labels.device)
        return task.corrupt(self.network.model, labels, sigma.float(), eps)


def perplexity(nats: dict[str, float]) -> dict[str, float]:
    """The exponential of a bound in nats, with its interval; its error to first order."""
    if nats["nats_bound_high"] > LARGEST:
        return {}
    mean = math.exp(nats["nats_bound"])
    return {
        "perplexity_bound": mean,
        "perplexity_bound_error": mean * nats["nats_bound_error"],
        "perplexity_bound_low": math.exp(nats["nats_bound_low"]),
        "perplexity_bound_high": math.exp(nats["nats_bound_high"]),
    }
