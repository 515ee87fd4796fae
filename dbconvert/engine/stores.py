"""Where tensors lie while they are away from the training device: in host memory, or in files that are mapped."""

from __future__ import annotations

import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from dbconvert.engine.ram import GB, available_bytes, return_freed
from dbconvert.errors import DBConvertError
from dbconvert.files import write_error
from dbconvert.recipe import Inactive
from dbconvert.stream import size_of, write_items
from dbconvert.tensorfile import read_header

ALIGNED = 64
"""Bytes that a tensor in host memory begins at a multiple of."""
AWAY = "away"
ALL_THERE = "parameters and optimiser state of all blocks lie there while others train"


class Store(ABC):
    """Gives tensors room away from the training device. A context manager: what it gave is not to be used after it."""

    @abstractmethod
    def refuse_full(self, needed: int) -> None:
        """
        Raises:
            DBConvertError: it has no room for `needed` bytes.
        """

    @abstractmethod
    def room(self, name: str, outlines: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Zeros of the same shapes and dtypes, in memory of the CPU.

        Args:
            name: of all of them together; what had it before is let go.
        """

    @abstractmethod
    def expect(self, name: str) -> None:
        """What has this name will be read soon."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of everything."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class HostStore(Store):
    """Memory of the CPU, page-locked where a CUDA device copies from it.

    Args:
        pinned: locked after it was had, since torch's own page-locked memory comes in powers of two.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self.locked: dict[str, Tensor] = {}

    def refuse_full(self, needed: int) -> None:
        free = available_bytes()
        if needed > free:
            raise DBConvertError(
                f"train.inactive=host needs {needed / GB:.2f} GB of memory, and {free / GB:.2f} GB are free",
                why=ALL_THERE,
                hint="use train.inactive=disk",
            )

    def room(self, name: str, outlines: Mapping[str, Tensor]) -> dict[str, Tensor]:
        at, starts = 0, {}
        for key, outline in outlines.items():
            starts[key] = at
            at += math.ceil(size_of(outline) / ALIGNED) * ALIGNED
        self.unlock(name)
        flat = torch.zeros(at, dtype=torch.uint8)
        if self.pinned and at:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(int(runtime.cudaHostRegister(flat.data_ptr(), at, 0)))
            self.locked[name] = flat
        return {key: part(flat, starts[key], outline) for key, outline in outlines.items()}

    def unlock(self, name: str) -> None:
        flat = self.locked.pop(name, None)
        if flat is not None:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(int(runtime.cudaHostUnregister(flat.data_ptr())))

    def expect(self, name: str) -> None:
        """It is in memory already."""

    def close(self) -> None:
        for name in list(self.locked):
            self.unlock(name)


class DiskStore(Store):
    """Safetensors files in a folder of their own, mapped into memory: what is written to a tensor gets to its file.

    The space of a file is reserved when it is made, so that a full disk shows then and not while it is written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.close()

    def room(self, name: str, outlines: Mapping[str, Tensor]) -> dict[str, Tensor]:
        path = self.path(name)
        path.unlink(missing_ok=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_items(path, {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in outlines.items()})
            size = path.stat().st_size
            reserve(path, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise write_error(error, path) from error
        flat = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        return {key: part(flat, stored.start, outlines[key]) for key, stored in read_header(path)[0].items()}

    def expect(self, name: str) -> None:
        """Lets the system read the file ahead into its own cache."""
        path = self.path(name)
        if path.exists() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()  # a run that did not come into being leaves no folder

    def refuse_full(self, needed: int) -> None:
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise DBConvertError(
                f"train.inactive=disk needs {needed / GB:.2f} GB in {there}, and its disk has {free / GB:.2f} GB left",
                why=ALL_THERE,
                hint="free some space, write the run to another disk with -o, or use train.inactive=host",
            )


def open_store(inactive: Inactive, folder: Path, device: torch.device) -> Store | None:
    """Where a recipe wants inactive blocks; None where they stay on the device.

    Args:
        folder: of the run.
    """
    if inactive == "resident":
        return None
    if inactive == "host":
        return HostStore(pinned=device.type == "cuda")
    if device.type == "cpu":
        return_freed()
    return DiskStore(folder / AWAY)


def part(flat: Tensor, start: int, outline: Tensor) -> Tensor:
    """A tensor of the shape and dtype of `outline` in some bytes."""
    return flat[start : start + size_of(outline)].view(outline.dtype).view(outline.shape)


def reserve(path: Path, size: int) -> None:
    """Makes sure of the disk space of a file that may have holes."""
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        holes = bytes(1 << 20)
        header = file.read(1 << 20)
        file.seek(0)
        file.write(header)
        for at in range(len(header), size, len(holes)):
            file.write(holes[: size - at])
