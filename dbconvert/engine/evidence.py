"""How well a network of masked tokens knows a text: the evidence bound, with its error.

    -ln p(x) <= sum over blocks b of (t_high - t_low) E[-alpha'(t) / (1 - alpha(t)) CE(hidden)]  +  CE(hidden at t_min)

with t even within the block's own interval. The last term is what is still hidden at the earliest time.

It bounds what the blocks themselves say, whatever they were trained on. Where a block hears its predecessor it says
p(x_s | x_t, x_t'), with t' the later time of that predecessor's last evaluation: the reverse process may look back
along its own path. It is judged on paths of the true process, where x_t' hides all that x_t hides, and what is
delivered follows from x_t' without chance; so the sum stays a bound, that of a sampler that takes many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dbconvert.data.batches import derive
from dbconvert.diffusion.intervals import Intervals
from dbconvert.engine.cascade import noised
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.errors import DBConvertError
from dbconvert.tasks.base import Inputs

CONFIDENCE = 1.96
"""Standard errors on either side of a mean that hold the truth in 95 of 100 cases."""


Share = Callable[[int, Inputs, Tensor, torch.Generator], Tensor]
"""A block's term of a bound for each example of a batch, in nats, [N] double."""


@dataclass(frozen=True)
class Evidence:
    """Estimates the bound, example by example.

    Args:
        intervals: the times of each block; one of all where a baseline runs `layers`.
        draws: masked copies of an example for each block, one in each of as many equal parts of its interval.
    """

    network: BlockwiseNetwork
    intervals: Intervals
    draws: int
    seed: int
    layers: range | None = None

    def measure(self, batches: Iterable[tuple[Inputs, Tensor]], characters_per_token: float) -> dict[str, float]:
        """Figures over all examples.

        `nats_block_b` is block b's share of `nats_per_token`, where all are there; `_error` is a standard error over
        examples and draws, and `bits_per_character` has a 95 % interval from `_low` to `_high`.
        """
        blocks = [0] if self.layers is not None else list(self.network.present)
        rows, counts = gathered(batches, blocks, self.share, self.network.task.counted, self.seed)
        return figures(rows, counts, blocks, self.intervals.blocks, characters_per_token)

    def share(self, block: int, inputs: Inputs, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One block's term of the bound for each example, in nats, [N] double."""
        if self.draws < 1:
            raise DBConvertError("the bound needs at least one draw", hint="set eval.draws=1 or more")
        low, high = self.intervals.owned(block)
        total = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        for draw in range(self.draws):
            place = (draw + torch.rand(len(labels), generator=generator, dtype=torch.float64)) / self.draws
            total += self.losses(block, inputs, labels, low + place * (high - low), generator)
        total *= (high - low) / self.draws
        if block == self.intervals.blocks - 1:
            first = torch.full((len(labels),), low, dtype=torch.float64)
            weight = self.network.task.masking.weight(first).to(labels.device)
            total += self.losses(block, inputs, labels, first, generator) / weight
        return total

    def losses(self, block: int, inputs: Inputs, labels: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """Weighted losses of one masked copy of each example, summed over its positions, [N] double."""
        task = self.network.task
        eps = task.draw(inputs, generator=generator).to(labels.device)
        level = t.to(labels.device, torch.float32)
        if self.layers is not None:
            found: Tensor = self.network(None, inputs, labels, level, eps, layers=self.layers)
        else:
            before = noised(self.network, self.intervals, generator)
            found = self.network(block, inputs, labels, level, eps, before=before)
        return (found * task.counted(labels)).sum(-1).double()


def gathered(
    batches: Iterable[tuple[Inputs, Tensor]],
    blocks: list[int],
    share: Share,
    counted: Callable[[Tensor], Tensor],
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Every example's nats by block, [N, blocks], and how many of its labels count, [N]; double, on the CPU."""
    rows, counts = [], []
    for index, (inputs, labels) in enumerate(batches):
        generator = torch.Generator().manual_seed(derive(seed, "evidence", index))
        rows.append(torch.stack([share(b, inputs, labels, generator) for b in blocks], -1).cpu())
        counts.append(counted(labels).sum(-1).double().cpu())
    return torch.cat(rows), torch.cat(counts)


def by_block(rows: Tensor, counts: Tensor, blocks: list[int]) -> dict[str, float]:
    """`nats_block_b`: each block's share of the nats a token."""
    tokens = float(counts.sum())
    return {f"nats_block_{b}": float(rows[:, i].sum()) / tokens for i, b in enumerate(blocks)}


def mean_and_error(rows: Tensor, counts: Tensor) -> tuple[float, float]:
    """Nats a token and their standard error, over examples that weigh as many as their tokens."""
    tokens, examples = float(counts.sum()), len(rows)
    nats = float(rows.sum()) / tokens
    apart = rows.sum(-1) - nats * counts
    return nats, float((apart.square().sum() * examples / max(1, examples - 1)).sqrt()) / tokens


def with_interval(name: str, mean: float, error: float) -> dict[str, float]:
    """A figure, its standard error, and its 95 % interval from `_low` to `_high`."""
    low, high = mean - CONFIDENCE * error, mean + CONFIDENCE * error
    return {name: mean, f"{name}_error": error, f"{name}_low": low, f"{name}_high": high}


def bits_per_character(nats: float, error: float, characters_per_token: float) -> dict[str, float]:
    bits = 1 / (math.log(2) * characters_per_token)
    return with_interval("bits_per_character", nats * bits, error * bits)


def figures(rows: Tensor, counts: Tensor, blocks: list[int], of: int, characters_per_token: float) -> dict[str, float]:
    """Means and errors of nats [N, blocks] over examples of `counts` [N] tokens."""
    found = by_block(rows, counts, blocks)
    if len(blocks) < of:
        return found
    nats, error = mean_and_error(rows, counts)
    return {
        **(found if of > 1 else {}),
        "nats_per_token": nats,
        "nats_per_token_error": error,
        **bits_per_character(nats, error, characters_per_token),
    }
