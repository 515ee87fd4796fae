"""The header of a safetensors file, checked, and where in the file each tensor's bytes lie."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbconvert.errors import DBConvertError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 100 * 2**20
LENGTH_BYTES = 8
METADATA = "__metadata__"


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file.

    Args:
        start: offset of its first byte in the file.
        size: in bytes.
        kind: its dtype as safetensors names it.
    """

    path: Path
    start: int
    size: int
    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.kind]

    def outline(self) -> Tensor:
        """A tensor of its shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Where the tensors of a safetensors file lie, and its metadata; nothing else is read.

    Raises:
        DBConvertError: there is no such file, or it is truncated, damaged or not safetensors.
    """
    if not path.is_file():
        raise DBConvertError(f"{path} does not exist")
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if total < LENGTH_BYTES or length > min(MOST_HEADER, total - LENGTH_BYTES):
            raise damaged(path, f"its header should have {length:,} bytes, and the file has {total:,}")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop(METADATA, None) or {}
        base = LENGTH_BYTES + length
        found = {key: located(path, base, entry) for key, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its header cannot be read: {error}") from None
    refuse_gaps(path, found, base, total)
    return found, metadata


def located(path: Path, base: int, entry: dict[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    kind = entry["dtype"]
    if kind not in DTYPES:
        raise ValueError(f"unknown kind of number {kind}")
    if any(type(value) is not int or value < 0 for value in (begin, end, *shape)):
        raise ValueError(f"offsets {begin} to {end} and shape {list(shape)}")
    if end - begin != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{end - begin} bytes for {kind} of shape {list(shape)}")
    return Stored(path, base + begin, end - begin, kind, shape)


def refuse_gaps(path: Path, found: dict[str, Stored], base: int, total: int) -> None:
    """Tensors must fill the file: no byte in two of them, none in no one, none behind the end."""
    at = base
    for stored in sorted(found.values(), key=lambda stored: (stored.start, stored.size)):
        if stored.start != at:
            raise damaged(path, f"its tensors overlap or leave gaps at byte {at:,}")
        at += stored.size
    if at != total:
        raise damaged(path, f"its tensors should end at byte {at:,}, and the file has {total:,}")


def damaged(path: Path, why: str) -> DBConvertError:
    return DBConvertError(
        f"{path} is not a whole safetensors file",
        why=why,
        hint="it may be truncated: copy or download it again",
    )


def chunks(stored: Stored, size: int = 1 << 20) -> Iterator[bytes]:
    """The bytes of a stored tensor, piece by piece."""
    left = stored.size
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        while left:
            piece = file.read(min(size, left))
            if not piece:
                raise damaged(stored.path, "it became shorter while it was read")
            left -= len(piece)
            yield piece


def same_bytes(first: Stored, second: Stored) -> bool:
    """Whether two stored tensors are equal in dtype, shape and every byte."""
    if (first.kind, first.shape) != (second.kind, second.shape):
        return False
    return all(a == b for a, b in zip(chunks(first), chunks(second), strict=True))
