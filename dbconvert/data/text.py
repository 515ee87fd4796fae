"""Opening a corpus of text: a built-in name, text files, tables of documents, a hub id, or a function in a file.

A single file of text or of documents is cut by position into train, validation and test. A folder has its parts by
name; a folder of text files without any has its files dealt out by their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dbconvert.data.datasets import BUILT_IN, open_part
from dbconvert.data.documents import Documents, digest_of, limited, read_utf8, text_of
from dbconvert.data.parts import SHARES, deal, sliced, span
from dbconvert.data.tables import FORMATS, from_repository, from_table_file
from dbconvert.data_options import DataOptions
from dbconvert.errors import UsageError
from dbconvert.files import sha256_file
from dbconvert.schema import identity

KINDS = "pydoc, a text file, JSON lines, parquet, a folder of them, a hub id, or file.py:function"

HELD_OUT = ("validation", "test")


def open_documents(options: DataOptions, part: str) -> Documents:
    """The documents of one part.

    Args:
        part: train, validation or test of a single file; what the folder, hub id or function calls it; or a file
            beside the source.

    Raises:
        UsageError: no source is given, it is of no known kind, or it has no such part.
        DBConvertError: it cannot be read.
    """
    return limited(find(options, part), options.limit)


def find(options: DataOptions, part: str) -> Documents:
    source = options.source
    if source is None:
        raise UsageError("no data is given", hint=f"add data.source=NAME: {KINDS}")
    if source in BUILT_IN or ".py:" in source:
        return from_dataset(options, part)
    path = Path(source)
    if path.is_dir():
        return from_folder(path, options, part)
    if path.is_file():
        return from_file(path, options, part)
    if source.count("/") == 1 and path.suffix not in (*FORMATS, ".txt"):
        return from_repository(options, part)
    raise UsageError(f"data source {source} does not exist", hint=f"give {KINDS}")


def from_dataset(options: DataOptions, part: str) -> Documents:
    """Of a map-style dataset of dicts."""
    dataset, name = open_part(options, part), f"part {part} of {options.source}"

    def read() -> Iterator[str]:
        for index in range(len(dataset)):
            yield text_of(dataset[index], options.text, index, name)

    return Documents(name, digest_of(read()), read)


# -- a single file ----------------------------------------------------------------------------------------------


def from_file(path: Path, options: DataOptions, part: str) -> Documents:
    other = beside(path.parent, part)
    if other is not None:
        return whole_file(other, options, part)
    word = part.partition("[")[0]
    if word not in SHARES or ("[" in part and path.suffix not in FORMATS and per_cent(part) is None):
        raise UsageError(
            f"{path} has no part {part}",
            hint="parts: train, validation and test (90, 5 and 5 % of it), all, a piece in per cent (train[:90%]), or "
            "another file's name",
        )
    if word in HELD_OUT and not cut(options):
        raise UsageError(
            f"the whole of {path} is its training part",
            why="neither data.validation nor data.test is a share of it",
            hint=f"name another file, or train with data.{word}={word}",
        )
    share = "all" if word == "train" and not cut(options) else word
    if path.suffix in FORMATS:
        return from_table_file(path, options, part, share)
    return from_text(path, part, share)


def beside(folder: Path, part: str) -> Path | None:
    """The file that a part's name is, in the source's folder or at a path of its own."""
    if part in SHARES:
        return None
    return next((path for path in (folder / part, Path(part)) if path.is_file()), None)


def cut(options: DataOptions) -> bool:
    """Whether a single file has to give other parts than the training part."""
    return any(part in HELD_OUT for part in (options.validation, options.test))


def whole_file(path: Path, options: DataOptions, part: str) -> Documents:
    if path.suffix in FORMATS:
        return from_table_file(path, options, part, "all")
    return from_text(path, part, "all")


def per_cent(part: str) -> tuple[int, int] | None:
    """Where a piece of a part begins and ends, None where the part is not a piece in per cent."""
    piece = sliced(part)
    return (piece.first, 100 if piece.last is None else piece.last) if piece and piece.per_cent else None


def from_text(path: Path, part: str, share: str) -> Documents:
    """A text file as one document, or a share of it by characters."""
    ends = per_cent(part) or SHARES[share]

    def read() -> Iterator[str]:
        text = read_utf8(path)
        chosen = span(len(text), ends)
        yield text[chosen.start : chosen.stop]

    name = f"part {part} of {path}" if ends != SHARES["all"] else str(path)
    return Documents(name, identity([sha256_file(path), ends]), read)


# -- a folder ---------------------------------------------------------------------------------------------------


def from_folder(folder: Path, options: DataOptions, part: str) -> Documents:
    other = beside(folder, part)
    if other is not None:
        return whole_file(other, options, part)
    if any(file.suffix in FORMATS and file.suffix != ".json" for file in folder.rglob("*")):
        return from_repository(options, part)
    if any(folder.rglob("*.txt")):
        return from_texts(text_files(folder, part), folder, part)
    if any(folder.rglob("*.json")):
        return from_repository(options, part)
    raise UsageError(f"{folder} holds no text", hint="give .txt files, JSON lines or parquet")


def text_files(folder: Path, part: str) -> list[Path]:
    """The files of one part: a sub-folder or a file of its name; else its share of all files.

    Raises:
        UsageError: other parts have a sub-folder or a file, and this one has none.
    """
    if (folder / part).is_dir():
        return sorted((folder / part).rglob("*.txt"))
    if (folder / f"{part}.txt").is_file():
        return [folder / f"{part}.txt"]
    named = [name for name in SHARES if (folder / name).is_dir() or (folder / f"{name}.txt").is_file()]
    ends = SHARES.get(part) or per_cent(part)
    if named or ends is None or part.partition("[")[0] not in SHARES:
        there = named or list(SHARES)
        raise UsageError(f"{folder} has no part {part}", hint=f"parts: {', '.join(there)}; null leaves one out")
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*.txt")}
    return [folder / name for name in deal(sizes, ends)]


def from_texts(files: Sequence[Path], folder: Path, part: str) -> Documents:
    """One document a file."""
    content = [[str(file.relative_to(folder)), sha256_file(file)] for file in files]
    return Documents(f"part {part} of {folder}", identity(content), lambda: map(read_utf8, files))
