"""Files and folders that appear whole or not at all, their digests, and links that lead elsewhere."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dbconvert.errors import DBConvertError, UsageError

MARKER = ".dbconvert"
"""A file of this name marks a folder as one of ours: only such a folder is ever replaced."""


# -- atomic files and folders -------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes otherwise.

    Args:
        flush: wait until the disk has it; needless for what can be made again from other files.

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
            if flush:
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


# -- digests ------------------------------------------------------------------------------------------------

SAMPLED = "sampled:"
SMALL = 64 * 2**20
WINDOW, STRIDE = 64 * 2**10, 4 * 2**20


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def quick_digest(path: Path) -> str:
    """What tells a file from another one, at a small part of the time that copying it takes.

    Up to 64 MB it is the file's SHA-256. Above, SHA-256 takes longer than the copy itself, and `sampled:` is
    followed by the SHA-256 of the size, the first and the last 64 KB and 64 KB of every 4 MB: a truncated file, a
    file of another split and almost any other weights show, a single flipped bit may not.
    """
    size = path.stat().st_size
    if size <= SMALL:
        return sha256_file(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as file:
        for at in [*range(0, size, STRIDE), size - WINDOW]:
            file.seek(at)
            digest.update(file.read(WINDOW))
    return SAMPLED + digest.hexdigest()


def matches(path: Path, digest: str) -> bool:
    """Whether a file has a digest of either kind."""
    found = quick_digest(path) if digest.startswith(SAMPLED) else sha256_file(path)
    return found == digest


# -- links --------------------------------------------------------------------------------------------------


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder, if it lies there, or in the blobs of the hub cache that the folder is part of.

    Raises:
        DBConvertError: the name or a link leads elsewhere.
    """
    path, home = folder / name, folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(allowed) for allowed in homes):
        raise DBConvertError(
            f"{path} leads outside of its folder",
            why=f"it is {path.resolve()}",
            hint="put the file itself into the folder",
        )
    return path
