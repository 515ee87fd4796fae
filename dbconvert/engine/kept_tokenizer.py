"""The tokenizer of a run, kept with what it leaves behind: its description, and its files where it has any."""

from __future__ import annotations

import shutil
from pathlib import Path

from dbconvert.data.tokenizers import Tokenizer
from dbconvert.files import atomic_folder, write_text
from dbconvert.schema import to_json

FILE, FOLDER = "tokenizer_used.json", "tokenizer"
KEY = "dbconvert.tokenizer"
"""Metadata key of the description in checkpoints."""
SUFFIX = ".tokenizer"
"""Of the folder that lies beside a checkpoint of one file."""


def keep(tokenizer: Tokenizer | None, folder: Path) -> None:
    """Writes a tokenizer into a run's folder."""
    if tokenizer is not None:
        tokenizer.save(folder / FOLDER)
        write_text(folder / FILE, to_json(tokenizer.describe()))


def metadata_of(run: Path) -> dict[str, str]:
    """What a checkpoint says of a run's tokenizer."""
    path = run / FILE
    return {KEY: path.read_text(encoding="utf-8")} if path.is_file() else {}


def copy_beside(run: Path, checkpoint: Path, *, force: bool) -> None:
    """Puts the files of a run's tokenizer beside a checkpoint of one file."""
    if (run / FOLDER).is_dir():
        with atomic_folder(beside(checkpoint), force=force) as temporary:
            shutil.copytree(run / FOLDER, temporary, dirs_exist_ok=True)


def copy_into(run: Path, folder: Path) -> None:
    """Puts them into a folder that is passed on, where it has none of their names yet."""
    for path in (run / FOLDER).iterdir() if (run / FOLDER).is_dir() else ():
        if not (folder / path.name).exists():
            shutil.copy2(path, folder / path.name)


def beside(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name.partition(".safetensors")[0] + SUFFIX)
