"""Opening a tokenizer: the one that options name, or the one that was stored with a run or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dbconvert.data.documents import Documents
from dbconvert.data.text import open_documents
from dbconvert.data.tokenizers import KINDS, ByteTokenizer, CharTokenizer, Description, Tokenizer, TransformersTokenizer
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.sources.tokenizers import holds_tokenizer, load_tokenizer


def open_tokenizer(options: DataOptions, beside: Path | None = None) -> Tokenizer:
    """The tokenizer that the options name; the characters of `char` are those of the training part.

    Args:
        beside: a folder whose tokenizer is taken where the options name none, e.g. that of the source.

    Raises:
        UsageError: none is named, or there is none of that name.
        DBConvertError: it, or the training part, cannot be read.
    """
    name = options.tokenizer
    if name is None and beside is not None and holds_tokenizer(beside):
        name = str(beside)
    if name is None:
        raise UsageError("no tokenizer is given", hint=f"add data.tokenizer=NAME: {KINDS}")
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer(characters_of(open_documents(options, options.train)))
    return TransformersTokenizer(load_tokenizer(name), name)


def characters_of(documents: Documents) -> str:
    """Every character of some documents, in the order of code points; a line break where it has to part them.

    Raises:
        DBConvertError: there is none.
    """
    found: set[str] = set()
    count = 0
    for text in documents:
        found.update(text)
        count += 1
    if not found:
        raise DBConvertError(f"{documents.name} holds no text")
    if count > 1:
        found.add("\n")
    return "".join(sorted(found))


def from_description(description: Description, places: Iterable[str | Path] = ()) -> Tokenizer:
    """A tokenizer that was stored.

    Args:
        places: folders or hub ids in which the files of a Transformers tokenizer are looked for; where it was found
            first is never opened.

    Raises:
        DBConvertError: the description is damaged, or no place holds this tokenizer.
    """
    if description.kind == "transformers":
        return stored_files(description, [str(place) for place in places])
    tokenizer = CharTokenizer(description.characters or "") if description.kind == "char" else ByteTokenizer()
    if tokenizer.fingerprint != description.fingerprint:
        raise DBConvertError(f"the description of the {description.kind} tokenizer is damaged")
    return tokenizer


def stored_files(description: Description, places: list[str]) -> Tokenizer:
    others = []
    for place in places:
        if Path(place).is_dir() and not holds_tokenizer(Path(place)):
            continue
        tokenizer = TransformersTokenizer(load_tokenizer(place), place)
        if tokenizer.fingerprint == description.fingerprint:
            return tokenizer
        others.append(place)
    if others:
        raise DBConvertError(
            f"the tokenizer of {others[0]} is not the one that the network was trained with",
            hint=f"give that one with data.tokenizer=...; it was {description.location}",
        )
    raise DBConvertError(
        "the tokenizer's files are missing",
        where=", ".join(places),
        hint=f"give it with data.tokenizer=...; it was {description.location}",
    )
