"""The parts of a corpus that has none of its own: fixed shares, by position or by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

SHARES = {"train": (0, 90), "validation": (90, 95), "test": (95, 100), "all": (0, 100)}
"""Where each part of a single file begins and ends, in per cent."""


def span(size: int, part: str) -> range:
    """The positions that a part of SHARES has among `size`."""
    first, last = SHARES[part]
    return range(size * first // 100, size * last // 100)


def deal(sizes: Mapping[str, int], shares: Mapping[str, tuple[int, int]], part: str) -> list[str]:
    """The names of one part: all in a fixed order that only the names decide, dealt out by size.

    A name belongs to the part in which its middle lies. Returns them in alphabetical order.
    """
    order = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    total, before, chosen = sum(sizes.values()), 0, []
    first, last = shares[part]
    for name in order:
        middle = before + sizes[name] / 2
        if first * total <= 100 * middle < last * total:
            chosen.append(name)
        before += sizes[name]
    return sorted(chosen)
