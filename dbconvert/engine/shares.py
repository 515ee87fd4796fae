"""What a trained network's blocks resolve: its cross-entropy over sigma, and each block's share of the way down."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from dbconvert.data.batches import derive
from dbconvert.diffusion.intervals import Intervals
from dbconvert.engine.cascade import noised
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.tasks.base import Inputs


@torch.no_grad()
def cross_entropies(
    network: BlockwiseNetwork,
    intervals: Intervals,
    batches: Iterable[tuple[Inputs, Tensor]],
    levels: Iterable[float],
    *,
    draws: int,
    seed: int,
) -> list[float]:
    """Mean cross-entropy at each level, by the block that owns it, under the same noise at every level."""
    task, levels = network.task, list(levels)
    totals, counted = torch.zeros(len(levels), dtype=torch.float64), 0.0
    for index, (inputs, labels) in enumerate(batches):
        generator = torch.Generator().manual_seed(derive(seed, "curve", index))
        counts = task.counted(labels)
        counted += float(counts.sum()) * draws
        for _ in range(draws):
            eps = task.draw(inputs, generator=generator).to(labels.device)
            state = generator.get_state()
            for i, level in enumerate(levels):
                generator.set_state(state)  # earlier blocks meet the same noise too
                sigma = torch.full((len(labels),), level, device=labels.device)
                before = noised(network, intervals, generator)
                losses = network(intervals.block_of(level), inputs, labels, sigma, eps, before=before)
                totals[i] += float((losses * counts).double().sum())
    return [float(total) / counted for total in totals]


def entropy_shares(at: list[float]) -> dict[str, float]:
    """`entropy_share_block_b` from the cross-entropies at the B + 1 boundaries, lowest level first.

    The drop over a block's own interval over that from sigma_max to sigma_min; empty where there is none.
    """
    whole = at[-1] - at[0]
    drops = [(high - low) / whole for low, high in pairwise(at)][::-1] if whole > 0 else []
    return {f"entropy_share_block_{b}": drop for b, drop in enumerate(drops)}
