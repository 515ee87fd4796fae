"""How much texts repeat themselves, counted in tokens. Shapes: N texts of T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

GRAM = 4
"""Tokens in a row that count as said again."""


def distinct_2(tokens: Tensor) -> float:
    """Different pairs of neighbouring tokens over all such pairs, in all texts [N, T] together (Li et al. 2016)."""
    pairs = tokens.unfold(1, 2, 1).flatten(0, 1)
    return len(torch.unique(pairs, dim=0)) / len(pairs)


def repetition(tokens: Tensor) -> float:
    """The share of tokens [N, T] that lie in four in a row which began earlier in the same text too.

    The earlier four may overlap the later ones; their own tokens do not count, unless they repeat others.
    """
    return sum(map(repeated, tokens.tolist())) / tokens.numel()


def repeated(text: list[int]) -> int:
    """How many tokens of one text lie in a repetition."""
    seen: set[tuple[int, ...]] = set()
    inside: set[int] = set()
    for start in range(len(text) - GRAM + 1):
        gram = tuple(text[start : start + GRAM])
        if gram in seen:
            inside.update(range(start, start + GRAM))
        seen.add(gram)
    return len(inside)
