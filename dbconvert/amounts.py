"""Amounts as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes, with their unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""
