"""The parts of a corpus that has none of its own: fixed shares, by position or by name, and slices of a part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

SHARES = {"train": (0, 90), "validation": (90, 95), "test": (95, 100), "all": (0, 100)}
"""Where each part of a single file begins and ends, in per cent."""

SLICE = re.compile(r"(?P<name>[^\[\]]+)\[(?P<first>\d*)(?P<first_per_cent>%?):(?P<last>\d*)(?P<last_per_cent>%?)\]")


@dataclass(frozen=True)
class Slice:
    """A piece of a part, from `first` up to `last` (None: to its end), in per cent or in documents."""

    name: str
    first: int
    last: int | None
    per_cent: bool

    def of(self, size: int) -> range:
        """The documents of the piece, of `size` in the part; per cent are rounded as the `datasets` library does."""
        ends = [self.first, size if self.last is None else self.last]
        if self.per_cent:
            ends = [round(self.first * size / 100), size if self.last is None else round(self.last * size / 100)]
        return range(min(ends[0], size), min(ends[1], size))


def sliced(part: str) -> Slice | None:
    """What a name like `train[:90%]` or `train[100:200]` means; None for names without a slice, or with another."""
    found = SLICE.fullmatch(part)
    if found is None:
        return None
    units = {bool(found[f"{end}_per_cent"]) for end in ("first", "last") if found[end]}
    if len(units) != 1 or any(found[f"{end}_per_cent"] and not found[end] for end in ("first", "last")):
        return None
    last = int(found["last"]) if found["last"] else None
    return Slice(found["name"], int(found["first"] or 0), last, units.pop())


def span(size: int, ends: tuple[int, int]) -> range:
    """The positions between two ends in per cent, among `size`."""
    first, last = ends
    return range(size * first // 100, size * last // 100)


def deal(sizes: Mapping[str, int], ends: tuple[int, int]) -> list[str]:
    """The names of a part between two ends in per cent: all in a fixed order that only they decide, dealt out by size.

    A name belongs to the part in which its middle lies. Returns them in alphabetical order.
    """
    order = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    total, before, chosen = sum(sizes.values()), 0, []
    first, last = ends
    for name in order:
        middle = before + sizes[name] / 2
        if first * total <= 100 * middle < last * total:
            chosen.append(name)
        before += sizes[name]
    return sorted(chosen)
