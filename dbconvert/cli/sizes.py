"""Amounts of memory and lists of numbers as people write them."""

from __future__ import annotations

import re

from dbconvert.errors import UsageError

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*")


def whole_bytes(text: str, option: str) -> int:
    """`24GB` (10^9 bytes) or `24GiB` (2^30 bytes) in bytes.

    Raises:
        UsageError: no amount, no unit, or nothing at all.
    """
    found = AMOUNT.fullmatch(text)
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise UsageError(f"{option} {text} is not an amount of memory", hint=f"e.g. {option} 24GB, or 24GiB")
    amount = int(float(found[1]) * unit)
    if amount == 0:
        raise UsageError(f"{option} {text} is nothing", hint=f"e.g. {option} 24GB")
    return amount


def whole_numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text} is not a list of whole numbers", hint=f"e.g. {option} 4,4,4") from None
