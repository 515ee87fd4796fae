"""How much memory this machine has left, that it gets back what is freed, and what it means to run out of it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dbconvert.errors import DBConvertError

MEMINFO = Path("/proc/meminfo")
GB = 1e9
MMAP_THRESHOLD, PIECE = -3, 2**20
"""M_MMAP_THRESHOLD of malloc.h, and from how many bytes on freed memory goes back to the system at once."""
NO_ROOM = ("can't allocate memory", "out of memory", "Cannot allocate memory")


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


def return_freed() -> None:
    """Makes the C library give freed tensors back to the system at once.

    glibc keeps what is freed in pieces of up to 32 MB for later, and tensors of other sizes do not fit into the gaps.
    With another C library nothing changes.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, PIECE)


def says_no_room(text: str) -> bool:
    return any(words in text for words in NO_ROOM)


@contextmanager
def memory_errors(where: str) -> Iterator[None]:
    """Running out of memory meanwhile, said for people.

    Raises:
        DBConvertError: there was not enough.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or says_no_room(str(error))):  # a CPU's allocator raises RuntimeError
            raise
        raise DBConvertError(
            "out of memory",
            where=where,
            why=next(filter(says_no_room, re.split(r"\. |\n", str(error))), ""),
            hint="lower train.batch, raise train.accumulate, set train.checkpointing=true or train.inactive=host or "
            "disk, or cut into more blocks; dbconvert estimate says what fits",
        ) from error
