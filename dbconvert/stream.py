"""Writing safetensors files whose tensors are in memory, or lie in other files and are copied byte for byte."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dbconvert.tensorfile import DTYPES, LENGTH_BYTES, METADATA, NAMES, Stored, damaged

Item = Stored | Tensor
"""A tensor to write: where its bytes lie, or the tensor itself."""

CHUNK = 1 << 20
UNSUPPORTED = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF)


def size_of(item: Item) -> int:
    """In bytes."""
    return item.size if isinstance(item, Stored) else item.numel() * item.element_size()


def kind_of(item: Item) -> str:
    return item.kind if isinstance(item, Stored) else NAMES[item.dtype]


def write_items(path: Path, items: Mapping[str, Item], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file. Stored tensors are copied by the kernel where it can, and never become tensors."""
    # Wide numbers first: then every tensor starts at a multiple of its item size, whatever the shapes.
    order = sorted(items, key=lambda key: (-DTYPES[kind_of(items[key])].itemsize, key))
    header: dict[str, Any] = {METADATA: {"format": "pt", **(metadata or {})}}
    at = 0
    for key in order:
        item = items[key]
        header[key] = {
            "dtype": kind_of(item),
            "shape": list(item.shape),
            "data_offsets": [at, at + size_of(item)],
        }
        at += size_of(item)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    sources: dict[Path, BinaryIO] = {}
    try:
        with path.open("wb", buffering=0) as file:
            write_all(file, len(text).to_bytes(LENGTH_BYTES, "little") + text)
            for key in order:
                write_item(file, items[key], sources)
            file.truncate(file.tell())
    finally:
        for source in sources.values():
            source.close()


def write_item(file: Any, item: Item, sources: dict[Path, BinaryIO]) -> None:
    if isinstance(item, Stored):
        if item.path not in sources:
            sources[item.path] = item.path.open("rb", buffering=0)
        copy_bytes(sources[item.path], file, item)
    elif is_zero(item):
        file.seek(size_of(item), os.SEEK_CUR)  # a hole in the file, which reads as zeros
    elif item.numel():
        flat = item.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        write_all(file, flat.numpy().data)


def is_zero(tensor: Tensor) -> bool:
    """Whether a tensor is a single zero in memory, expanded to its shape."""
    return bool(tensor.dim() and tensor.numel() and not any(tensor.stride()) and tensor[(0,) * tensor.dim()] == 0)


def write_all(file: Any, data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def copy_bytes(source: BinaryIO, target: Any, stored: Stored) -> None:
    """Copies a stored tensor's bytes to where `target` stands."""
    at, left = stored.start, stored.size
    while left:
        done = copied_by_kernel(source, target, at, left)
        if done is None:
            piece = os.pread(source.fileno(), min(CHUNK, left), at)
            write_all(target, piece)
            done = len(piece)
        if not done:
            raise damaged(stored.path, "it became shorter while it was copied")
        at, left = at + done, left - done


def copied_by_kernel(source: BinaryIO, target: Any, at: int, size: int) -> int | None:
    """How many bytes the kernel copied between the files, None where it cannot."""
    copy = getattr(os, "copy_file_range", None)
    if copy is None:
        return None
    try:
        return int(copy(source.fileno(), target.fileno(), size, at))
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        raise
