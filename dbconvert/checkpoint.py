"""Weights on disk: safetensors in, safetensors out, atomic, hashed. Nothing is ever unpickled."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dbconvert.errors import DBConvertError, UsageError

INDEX_SUFFIX = ".index.json"
MARKER = ".dbconvert"
"""A file of this name marks a folder as one of ours: only such a folder is ever replaced."""


# -- atomic files and folders -------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes otherwise.

    Raises:
        DBConvertError: the disk is full or the place cannot be written.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _flush(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes otherwise.

    Args:
        force: replace a folder that is there, if it carries our marker.

    Raises:
        UsageError: `path` is occupied.
        DBConvertError: the disk is full or the place cannot be written.
    """
    refuse_occupied(path, force=force)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        try:
            (temporary / MARKER).touch()
            yield temporary
            temporary.chmod(0o755)
            if path.exists():
                retired = temporary.with_suffix(".old")
                path.replace(retired)
                temporary.replace(path)
                shutil.rmtree(retired)
            else:
                temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_occupied(path: Path, *, force: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    ours = (path / MARKER).exists()
    if not force:
        hint = "give another -o, or --force to replace it" if ours else "give another -o"
        raise UsageError(f"{path} exists already", hint=hint)
    if not ours:
        raise UsageError(
            f"{path} was not written by dbconvert, so --force does not replace it",
            hint="remove it, or give another -o",
        )


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of the file system, said for people."""
    try:
        yield
    except OSError as error:
        raise write_error(error, path) from error
    except SafetensorError as error:
        full = "No space left" in str(error) or "os error 28" in str(error)
        raise write_error(OSError(errno.ENOSPC if full else errno.EIO, str(error)), path) from error


def write_error(error: OSError, path: Path) -> DBConvertError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DBConvertError(
            f"no space left on the disk while writing {path}",
            why="what was there before is untouched, and nothing half-written is left behind",
            hint="free some space, or write to another disk with -o",
        )
    return DBConvertError(f"cannot write {path}", why=error.strerror or str(error))


def append_line(path: Path, line: str) -> None:
    """Adds a line to a text file."""
    with _explained(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# -- tensors ------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Writes one safetensors file through a temporary one and returns its SHA-256."""
    ready = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})
        digest = sha256_file(temporary)
    return digest


def load_tensors(path: Path, keys: set[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all or those named.

    Raises:
        DBConvertError: the file is missing, truncated or not safetensors.
    """
    with _opened(path) as file:
        names = file.keys() if keys is None else [key for key in file.keys() if key in keys]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def read_metadata(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise DBConvertError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DBConvertError(
            f"{path} is not a whole safetensors file",
            why=str(error),
            hint="it may be truncated: copy or download it again",
        ) from None


# -- checkpoints of one or several files ----------------------------------------------------------------------


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], shard_bytes: int) -> Path:
    """One safetensors file, or shards and an index when the tensors exceed `shard_bytes`.

    Shards are written first and the index last, so that a checkpoint is either whole or absent. Returns the path
    to load: the file, or the index.
    """
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        save_tensors(path, tensors, metadata)
        return path
    weight_map, total = {}, 0
    for number, keys in enumerate(shards, 1):
        name = f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}"
        save_tensors(path.with_name(name), {key: tensors[key] for key in keys}, metadata)
        weight_map.update(dict.fromkeys(keys, name))
        total += sum(tensors[key].numel() * tensors[key].element_size() for key in keys)
    index = path.with_name(path.name + INDEX_SUFFIX)
    content = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
    write_text(index, json.dumps(content, indent=2) + "\n")
    return index


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    filled = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shard and filled + size > limit:
            yield shard
            shard, filled = [], 0
        shard.append(key)
        filled += size
    yield shard


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint: a safetensors file or the index of shards."""
    if not path.name.endswith(INDEX_SUFFIX):
        return load_tensors(path), read_metadata(path)
    index = json.loads(path.read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(index["weight_map"].values()):
        if Path(name).name != name:
            raise DBConvertError(f"{path.name} points outside of its folder: {name}")
        tensors.update(load_tensors(path.with_name(name)))
    missing = sorted(set(index["weight_map"]) - set(tensors))
    if missing:
        raise DBConvertError(f"{path} names tensors that its shards lack: {', '.join(missing[:5])}")
    return tensors, {key: value for key, value in index["metadata"].items() if isinstance(value, str)}


def load_weights(path: Path) -> dict[str, Tensor]:
    """A user's trained weights: safetensors, or a state_dict read with `weights_only`.

    Raises:
        DBConvertError: no such file, or it holds anything but tensors.
    """
    if path.suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX):
        return load_checkpoint(path)[0]
    if not path.is_file():
        raise DBConvertError(f"{path} does not exist")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DBConvertError(
            f"cannot read {path} as a state_dict",
            why=f"it is damaged, or holds more than tensors, which are never unpickled ({type(error).__name__})",
            hint="save the weights with safetensors, or torch.save(model.state_dict(), ...)",
        ) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DBConvertError(f"{path} is not a state_dict of tensors", hint="save model.state_dict()")
    return state
