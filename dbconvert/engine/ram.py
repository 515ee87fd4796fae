"""How much memory this machine has left."""

from __future__ import annotations

import os
from pathlib import Path

from dbconvert.errors import DBConvertError

MEMINFO = Path("/proc/meminfo")
GB = 1e9


def available_bytes() -> int:
    """Memory that can be had without swapping; all of the machine's where the system does not tell."""
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refuse_too_large(needed: int, network: str) -> None:
    """
    Raises:
        DBConvertError: `needed` bytes are more than there are.
    """
    there = available_bytes()
    if needed > there:
        raise DBConvertError(
            f"the weights of {network} do not fit into memory: they need {needed / GB:.1f} GB, "
            f"and {there / GB:.1f} GB are free",
            hint="inspect, estimate and split --dry-run need no weights; to split, use a larger machine",
        )
