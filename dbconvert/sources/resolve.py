"""Which kind of source a user's word is."""

from __future__ import annotations

import re
from pathlib import Path

from dbconvert.errors import DBConvertError, UsageError
from dbconvert.plan import SourceRef
from dbconvert.sources.base import Source
from dbconvert.sources.diffusers_source import DiffusersSource, is_diffusers
from dbconvert.sources.model_file import ModelFile
from dbconvert.sources.python_files import sha256_files
from dbconvert.sources.transformers_config import code_identity, read_settings
from dbconvert.sources.transformers_files import CONFIG
from dbconvert.sources.transformers_source import TransformersSource

HUB_ID = re.compile(r"^\w[\w.-]*/[\w.-]+$")


def open_source(text: str, *, trust: bool = False) -> Source:
    """`model.py`, `model.py:name`, a folder of Transformers or diffusers, or a hub id of Transformers.

    Args:
        trust: run the code that a Transformers folder or repository brings along.

    Raises:
        UsageError: it is none of these.
        DBConvertError: it is, but cannot be opened.
    """
    file, _, name = text.partition(".py:")
    if name:
        return ModelFile(Path(file + ".py"), name)
    path = Path(text)
    if text.endswith(".py"):
        return ModelFile(path)
    if path.is_dir():
        if is_diffusers(path):
            return DiffusersSource.open(path)
        if (path / "config.json").is_file():
            return TransformersSource.open(text, trust=trust)
        raise UsageError(f"{text} holds no config.json", hint="give a model.py, or a Transformers or diffusers folder")
    if path.exists():
        raise UsageError(f"{text} is not a source", hint="give a model.py, a Transformers folder or a hub id")
    if HUB_ID.match(text):
        return TransformersSource.open(text, trust=trust)
    raise UsageError(f"{text} does not exist", hint="give a model.py, model.py:name, a Transformers folder or a hub id")


def reopen_source(ref: SourceRef, folders: list[Path]) -> Source:
    """The source that a plan names, from the first of `folders` that holds exactly its files.

    A Transformers or diffusers source is rebuilt from the plan itself. Code is only ever run from a file whose content
    matches the plan's SHA-256.

    Raises:
        DBConvertError: no folder holds the files, or their content has changed.
    """
    if ref.kind == "diffusers":
        return DiffusersSource.from_plan(ref)
    if ref.kind == "transformers" and not has_code(ref):
        return TransformersSource.from_plan(ref)
    changed = []
    for folder in folders:
        if holds(folder, ref):
            if ref.kind == "transformers":
                return TransformersSource.from_plan(ref, folder)
            return ModelFile(folder / ref.files[0], ref.name)
        if complete(folder, ref):
            changed.append(folder / ref.files[0])
    if changed:
        raise DBConvertError(
            f"{changed[0]} is not the file that was split: its content has changed",
            hint="give the original with source=PATH (eval: --model PATH), or split again",
        )
    raise DBConvertError(
        f"the network's source {ref.files[0]} is missing",
        where=", ".join(str(folder) for folder in folders),
        hint=f"give it with source=PATH (eval: --model PATH); it was {ref.location}",
    )


def has_code(ref: SourceRef) -> bool:
    """Whether building the network runs Python files that are not Transformers' own."""
    return ref.kind == "model_file" or len(ref.files) > 1


def holds(folder: Path, ref: SourceRef) -> bool:
    """Whether a folder holds exactly the files that a plan names."""
    if not complete(folder, ref):
        return False
    if ref.kind == "transformers":
        settings = read_settings(folder / CONFIG, str(folder))
        return code_identity(ref.name, settings, folder, ref.files[1:]) == ref.sha256
    return sha256_files(folder, ref.files) == ref.sha256


def complete(folder: Path, ref: SourceRef) -> bool:
    return all((folder / file).is_file() for file in ref.files)
