"""Documents in tables, through the `datasets` library: JSON lines, parquet, CSV, folders of them, hub ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dbconvert.data.datasets import library, place_of
from dbconvert.data.documents import Documents, missing_column, text_of
from dbconvert.data.parts import SHARES, sliced, span
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.files import sha256_file
from dbconvert.schema import identity

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def from_table_file(path: Path, options: DataOptions, part: str, share: str) -> Documents:
    """The documents of one local file, one a row.

    Args:
        part: for messages; with a slice, as in `train[:80%]`, the library reads that.
        share: which of SHARES, where there is no slice.
    """
    name = f"part {part} of {path}"
    split = "train" + part[part.index("[") :] if "[" in part else "train"

    def read() -> Iterator[str]:
        if not path.stat().st_size or without_rows(path):
            return
        builder = open_builder(name, FORMATS[path.suffix], {"data_files": {"train": [str(path)]}})
        dataset = prepared(builder, split, name)
        rows = range(len(dataset)) if "[" in part else span(len(dataset), SHARES[share])
        yield from column_texts(dataset.select(rows), options.text, name)

    fingerprint = identity([sha256_file(path), FORMATS[path.suffix], options.text, split, SHARES[share]])
    return Documents(name, fingerprint, read)


def without_rows(path: Path) -> bool:
    """Whether a file is parquet without any rows, which the library cannot read."""
    if path.suffix != ".parquet":
        return False
    library(str(path))  # which brings pyarrow, or says how to have it
    from pyarrow import ArrowException, parquet

    try:
        return bool(parquet.read_metadata(path).num_rows == 0)
    except (ArrowException, OSError):
        return False  # the library says what is wrong with it


def from_repository(options: DataOptions, part: str) -> Documents:
    """The documents of a folder of tables or of a hub id, in the parts that the library finds there."""
    source = str(options.source)
    name = f"part {part} of {source}"
    builder = open_builder(name, source, place_of(options))

    def read() -> Iterator[str]:
        if files_without_rows(builder, part):
            return
        if options.streaming and not Path(source).is_dir():
            dataset = streamed(builder, part, name)
        else:
            dataset = prepared(builder, part, name)
        yield from column_texts(dataset, options.text, name)

    content = [source, builder.config_id, str(builder.hash), part, options.text]
    return Documents(name, identity(content), read)


def files_without_rows(builder: Any, part: str) -> bool:
    """Whether all files of a part lie here and are parquet without any rows."""
    piece = sliced(part)
    files = (builder.config.data_files or {}).get(part if piece is None else piece.name, [])
    return bool(files) and all(without_rows(Path(file)) for file in files)


def open_builder(name: str, path: str, options: dict[str, Any]) -> Any:
    datasets = library(path)
    try:
        return datasets.load_dataset_builder(path, **options)
    except Exception as error:  # the library raises many kinds, all meaning that it cannot be read
        raise unreadable(name, error) from None


def prepared(builder: Any, split: str, name: str) -> Any:
    try:
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except Exception as error:
        raise unreadable(name, error) from None


def streamed(builder: Any, part: str, name: str) -> Any:
    """A part or a piece of one; the library itself streams whole parts only."""
    piece = sliced(part)
    try:
        dataset = builder.as_streaming_dataset(split=part if piece is None else piece.name)
    except Exception as error:
        raise unreadable(name, error) from None
    if piece is None:
        return dataset
    size = size_of(builder, piece.name, name) if piece.per_cent else max(piece.first, piece.last or 0)
    rows = piece.of(size)
    rest = dataset.skip(rows.start)
    return rest if piece.last is None else rest.take(len(rows))


def size_of(builder: Any, part: str, name: str) -> int:
    """Documents of a part as its repository tells."""
    parts = builder.info.splits or {}
    if part in parts and parts[part].num_examples:
        return int(parts[part].num_examples)
    raise UsageError(
        f"cannot tell where {name} begins or ends",
        why="the repository does not say how many documents it has",
        hint=f"count documents from its beginning, as in {part}[:1000], or set data.streaming=false",
    )


def column_texts(dataset: Any, column: str, name: str) -> Iterator[str]:
    """The texts of a dataset of rows; other columns are not read."""
    if dataset.column_names is not None:
        if column not in dataset.column_names:
            raise missing_column(column, dataset.column_names, name)
        dataset = dataset.select_columns([column])
    index = 0
    try:
        for row in dataset:
            yield text_of(row, column, index, name)
            index += 1
    except DBConvertError:
        raise
    except Exception as error:
        raise unreadable(f"document {index} of {name}", error) from None


def unreadable(name: str, error: BaseException) -> DBConvertError:
    """Said with the innermost reason: the library wraps the one that helps."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
    hint = ""
    if "scripts are no longer supported" in reason:
        hint = "set data.revision=refs/convert/parquet, which holds its files in converted form"
    elif " on the Hub" in reason:
        hint = "check the name and the connection; there is no local file or folder of this name"
    elif "split" in reason.lower():
        hint = "name the parts there are with data.train, data.validation and data.test; null leaves one out"
    return DBConvertError(f"cannot read {name}", why=reason, hint=hint)
