"""Opening a data source: a built-in name, a hub id, a folder, parquet, or a function in a Python file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from dbconvert.data.digits import PARTS, Digits
from dbconvert.data.mosaics import open_mosaic, parts_of
from dbconvert.data.puzzles import PARTS as PUZZLE_PARTS
from dbconvert.data.puzzles import PUZZLES
from dbconvert.data.pydoc import PARTS as TOPIC_PARTS
from dbconvert.data.pydoc import topic_rows
from dbconvert.data_options import DataOptions, PuzzleOptions
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.sources.python_files import explained, load_file, neighbours_importable

BUILT_IN: dict[str, tuple[Collection[str], Callable[[str, PuzzleOptions], Any]]] = {
    "digits": (PARTS, lambda part, _: Digits(part)),
    "pydoc": (TOPIC_PARTS, lambda part, _: topic_rows(part)),
    **{name: (PUZZLE_PARTS, puzzle) for name, puzzle in PUZZLES.items()},
}
"""Name: its parts, and what opens one of them."""
EXPORTS = "refs/convert/"
TEXT = ("tokenizer", "length", "limit", "streaming")
"""Options that only text has."""


def open_part(options: DataOptions, part: str) -> Any:
    """A map-style dataset of dicts.

    Args:
        part: name of the part in the source, e.g. `train` or `train[:90%]`.

    Raises:
        UsageError: no source is given, or it is of no known kind.
        DBConvertError: it cannot be read.
    """
    source = options.source
    if source is None:
        raise UsageError(
            "no data is given",
            hint="add data.source=NAME: digits, a hub id, a folder, parquet, mosaics, file.py:function",
        )
    if options.puzzle is not None and source not in PUZZLES:
        raise UsageError(f"data.puzzle is for {', '.join(PUZZLES)}, and the source is {source}", hint="leave it out")
    if source in BUILT_IN:
        return built_in(source, part, options.puzzle or PuzzleOptions())
    if ".py:" in source:
        return from_function(source, part)
    path = Path(source)
    if options.tile is not None:
        return from_mosaics(path, part, options)
    if path.exists():
        return from_disk(path, part, options)
    if source.count("/") == 1 and not source.endswith(".parquet"):
        return from_library(source, place_of(options), part)
    raise UsageError(
        f"data source {source} does not exist",
        hint=f"give a built-in name ({', '.join(BUILT_IN)}), a hub id, a folder, a parquet file, or file.py:function",
    )


def refuse_text(options: DataOptions) -> None:
    """Raises UsageError for what only text has, where the data are something else."""
    default = DataOptions()
    for name in TEXT:
        if getattr(options, name) != getattr(default, name):
            hint = "data.train='train[:1000]' takes some examples of a dataset" if name == "limit" else "leave it out"
            raise UsageError(f"data.{name} is for text, and this task reads none", hint=hint)


def built_in(name: str, part: str, puzzle: PuzzleOptions) -> Any:
    parts, open_one = BUILT_IN[name]
    if part not in parts:
        raise UsageError(f"{name} has no part {part}", hint=f"parts: {', '.join(parts)}")
    return open_one(part, puzzle)


def from_function(source: str, part: str) -> Any:
    file, _, name = source.partition(".py:")
    path = Path(file + ".py").resolve()
    module = load_file(path)
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{path.name} has no function {name}")
    with neighbours_importable(path.parent), explained(path):
        dataset = function(part)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DBConvertError(
            f"{name}({part!r}) in {path.name} returned a {type(dataset).__name__}, not a map-style dataset",
            hint="return something with __len__ and __getitem__(index) -> dict",
        )
    return dataset


def place_of(options: DataOptions) -> dict[str, Any]:
    """Where in a repository: the branches of converted files name a configuration's files by its folder only."""
    exported = options.revision is not None and options.revision.startswith(EXPORTS)
    place = {"revision": options.revision, "data_dir" if exported else "name": options.config}
    return {key: value for key, value in place.items() if value is not None}


def from_disk(path: Path, part: str, options: DataOptions) -> Any:
    if path.is_file():
        if path.suffix != ".parquet":
            raise UsageError(f"{path} is not a parquet file", hint="use file.py:function for other formats")
        return from_library("parquet", {"data_files": {part.partition("[")[0]: str(path)}}, part)
    if any(path.rglob("*.parquet")):
        return from_library(str(path), place_of(options), part)
    if parts_of(path):
        raise UsageError(f"{path} holds mosaics", hint="say how large one picture is: data.tile=32")
    if not any(file.is_file() for file in path.rglob("*")):
        raise DBConvertError(f"{path} is empty", hint="pictures lie in a folder a class: train/cat/1.png")
    return from_library("imagefolder", {"data_dir": str(path)}, part)


def from_mosaics(path: Path, part: str, options: DataOptions) -> Any:
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder", hint="data.tile is for a folder of mosaics; leave it out otherwise")
    assert options.tile is not None
    return open_mosaic(path, part, options.tile, options.image.mode if options.image else None)


def from_library(name: str, options: dict[str, Any], part: str) -> Any:
    """Through the `datasets` library."""
    datasets = library(name)
    try:
        return datasets.load_dataset(name, split=part, **options)
    except Exception as error:  # the library raises many kinds, all meaning that it cannot be read
        reason = str(error).strip().split("\n", 1)[0]
        where = options.get("data_dir") or next(iter(options.get("data_files", {}).values()), name)
        raise DBConvertError(f"cannot read part {part} of {where}", why=reason) from None


def library(source: str) -> Any:
    """The `datasets` library, without its progress bars, and without what its readers log before they raise it."""
    try:
        import datasets
    except ImportError:
        raise DBConvertError(
            f"data source {source} needs the `datasets` library", hint="pip install 'dbconvert[data]'"
        ) from None
    datasets.disable_progress_bars()
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    return datasets
