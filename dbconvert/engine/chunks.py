"""Losses, and other figures, over a large vocabulary, whose scores are never held whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Measure = Callable[[Tensor, Tensor], Tensor]
"""Scores [..., K] and labels to a figure of every label, of the labels' shape."""
SCORES = 2**24
"""Scores that are held at once, 64 MiB in 32 bits."""


def piece_by_piece(
    read: Callable[[Tensor], Tensor], make: Callable[[Tensor], Tensor], features: Tensor, outputs: int
) -> Tensor:
    """make(read(features)) without gradient, some positions at a time.

    Args:
        read: features [N, S, d] to scores [N, S, outputs].
        make: scores to anything [N, S, ..].
        features: [N, S, d].
    """
    with torch.no_grad():
        if features.shape[:2].numel() * outputs <= SCORES:
            return make(read(features))
        some = torch.split(features.flatten(0, 1), max(1, SCORES // outputs))
        made = torch.cat([make(read(piece[None]))[0] for piece in some])
        return made.view(*features.shape[:2], *made.shape[1:])


def in_chunks(
    read: Callable[[Tensor], Tensor],
    measure: Measure,
    features: Tensor,
    labels: Tensor,
    outputs: int,
) -> Tensor:
    """measure(read(features), labels), some positions at a time; scores are made again for the backward pass.

    Args:
        read: features [N, S, d] to scores [N, S, outputs].
        features: [N, S, d]. labels: [N, S].

    Returns:
        [N, S].
    """
    if labels.numel() * outputs <= SCORES:
        return measure(read(features), labels)

    def one(some: Tensor, told: Tensor) -> Tensor:
        return measure(read(some[None]), told[None])[0]

    rows = max(1, SCORES // outputs)
    pieces = zip(torch.split(features.flatten(0, 1), rows), torch.split(labels.flatten(), rows), strict=True)
    found = [checkpoint(one, some, told, use_reentrant=False) for some, told in pieces]
    return torch.cat(found).view(labels.shape)
