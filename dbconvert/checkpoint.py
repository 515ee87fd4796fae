"""safetensors checkpoints of one or several files: written whole or not at all, read or only located."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dbconvert.errors import DBConvertError
from dbconvert.files import atomic_file, inside, write_text
from dbconvert.stream import Item, size_of, write_items
from dbconvert.tensorfile import Stored, damaged, read_header

INDEX_SUFFIX = ".index.json"


# -- tensors ------------------------------------------------------------------------------------------------


def save_tensors(
    path: Path, tensors: Mapping[str, Item], metadata: Mapping[str, str] | None = None, *, flush: bool = True
) -> None:
    """Writes one safetensors file through a temporary one; tensors that lie in other files are copied from there."""
    with atomic_file(path, flush=flush) as temporary:
        write_items(temporary, tensors, metadata)


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
        raise damaged(path, str(error)) from None


# -- checkpoints of one or several files ----------------------------------------------------------------------


def save_checkpoint(path: Path, tensors: Mapping[str, Item], metadata: Mapping[str, str], shard_bytes: int) -> Path:
    """One safetensors file, or shards and an index when the tensors exceed `shard_bytes`.

    Shards are written first and the index last, so that a checkpoint is either whole or absent. Returns the path
    to load: the file, or the index. The disk is not waited for: what it is made from is still there.
    """
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        save_tensors(path, tensors, metadata, flush=False)
        return path
    files = [
        path.with_name(f"{path.stem}-{n:05d}-of-{len(shards):05d}{path.suffix}") for n in range(1, len(shards) + 1)
    ]
    index = path.with_name(path.name + INDEX_SUFFIX)
    total = sum(map(size_of, tensors.values()))
    weight_map = {key: file.name for file, keys in zip(files, shards, strict=True) for key in keys}
    content = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
    try:
        for file, keys in zip(files, shards, strict=True):
            save_tensors(file, {key: tensors[key] for key in keys}, metadata, flush=False)
        write_text(index, json.dumps(content, indent=2) + "\n")
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
    return index


def _shards(tensors: Mapping[str, Item], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    filled = 0
    for key, tensor in tensors.items():
        size = size_of(tensor)
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
    weight_map, metadata = read_index(path)
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(weight_map.values()):
        tensors.update(load_tensors(file))
    refuse_absent(path, weight_map, tensors)
    return tensors, metadata


def locate_checkpoint(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Where the tensors of a checkpoint lie, and its metadata; no tensor is read.

    Raises:
        DBConvertError: a file is missing, damaged, or lies outside of the index's folder.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        return read_header(path)
    weight_map, metadata = read_index(path)
    found: dict[str, Stored] = {}
    for file in dict.fromkeys(weight_map.values()):
        found.update(read_header(file)[0])
    refuse_absent(path, weight_map, found)
    return found, metadata


def read_index(path: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The file of each tensor, and the metadata that are words.

    Raises:
        DBConvertError: it is not an index, or a file it names lies elsewhere.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        files = {name: inside(path.parent, name) for name in dict.fromkeys(index["weight_map"].values())}
        weight_map = {key: files[name] for key, name in index["weight_map"].items()}
        metadata = {k: v for k, v in (index.get("metadata") or {}).items() if isinstance(v, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DBConvertError(f"{path} is not an index of shards", why=str(error), hint="download it again") from None
    return weight_map, metadata


def refuse_absent(path: Path, weight_map: Mapping[str, Path], found: Mapping[str, object]) -> None:
    absent = sorted(set(weight_map) - set(found))
    if absent:
        raise DBConvertError(f"{path} names tensors that its shards lack: {', '.join(absent[:5])}")
