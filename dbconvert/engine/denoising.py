"""How well a network denoises examples: the weighted loss over each block's levels, over all, and at fixed ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dbconvert.data.batches import derive
from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.engine.cascade import Cascade, noised
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.tasks.base import Inputs


@dataclass(frozen=True)
class Denoising:
    """Measures one network; figures are means over examples of w(sigma) times the loss.

    Args:
        layers: for a baseline, the layers that run at every level; None for blocks.
        sigmas: how many fixed levels, of equal mass between them.
        seed: of the noise.
    """

    network: BlockwiseNetwork
    intervals: Intervals
    layers: range | None
    sigmas: int
    seed: int

    def measure(self, batches: Iterable[tuple[Inputs, Tensor]]) -> dict[str, float]:
        """`loss` over the whole distribution, `loss_block_b` over the levels that block b owns, `loss_sigma_s` at s.

        A baseline is measured at the same levels as the blocks. A single block has its own levels only.
        """
        totals: dict[str, float] = defaultdict(float)
        count = 0
        for index, (inputs, labels) in enumerate(batches):
            generator = torch.Generator().manual_seed(derive(self.seed, "eval", index))
            eps = self.network.task.draw(inputs, generator=generator).to(labels.device)
            for name, value in self.batch(inputs, labels, eps, generator).items():
                totals[name] += value * len(labels)
            count += len(labels)
        return {name: total / count for name, total in totals.items()}

    def batch(self, inputs: Inputs, labels: Tensor, eps: Tensor, generator: torch.Generator) -> dict[str, float]:
        distribution, found, whole = self.intervals.distribution, {}, 0.0
        before = None if self.layers is not None else noised(self.network, self.intervals, generator)
        for block in self.present:
            low, high = distribution.cdf(torch.tensor(self.intervals.owned(block), dtype=torch.float64))
            sigma = distribution.icdf(low + midpoints(len(labels)) * (high - low))
            found[f"loss_block_{block}"] = self.loss(block, inputs, labels, sigma, eps, before)
            whole += found[f"loss_block_{block}"] * self.intervals.share(block)
        if len(self.present) == self.intervals.blocks:
            found["loss"] = whole
        for level in distribution.icdf(midpoints(self.sigmas)).tolist():
            block = self.intervals.block_of(level)
            if block in self.present:
                sigma = torch.full((len(labels),), level)
                found[f"loss_sigma_{level:.4g}"] = self.loss(block, inputs, labels, sigma, eps, before)
        return found

    @property
    def present(self) -> tuple[int, ...]:
        return self.network.present if self.layers is None else tuple(range(self.intervals.blocks))

    def loss(
        self, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor, eps: Tensor, before: Cascade | None
    ) -> float:
        network, level = self.network, sigma.to(labels.device, torch.float32)
        runs = block if self.layers is None else None
        losses = network(runs, inputs, labels, level, eps, layers=self.layers, before=before)
        return network.task.mean(losses * Preconditioning(network.sigma_data).weight(level), labels)


def midpoints(count: int) -> Tensor:
    """The middles of `count` equal cells of [0, 1], float64."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / max(1, count)
