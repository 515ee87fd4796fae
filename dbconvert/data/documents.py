"""Documents of text: what a corpus is made of, read anew at every pass, and known by a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dbconvert.errors import DBConvertError
from dbconvert.schema import identity


@dataclass(frozen=True)
class Documents:
    """The documents of one part of a corpus.

    Args:
        name: what messages call them.
        fingerprint: equal for equal content, known without reading a remote corpus.
        read: begins a pass through them.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        """The texts in their order.

        Raises:
            DBConvertError: one is not proper Unicode, or the corpus cannot be read.
        """
        for index, text in enumerate(self.read()):
            yield proper(text, index, self.name)


def proper(text: str, index: int, name: str) -> str:
    """Refuses halves of surrogate pairs, which JSON can spell and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DBConvertError(
            f"document {index} of {name} is not proper Unicode",
            why=f"half of a surrogate pair stands at character {error.start}",
            hint="write the file again with the character itself, or without it",
        ) from None
    return text


def limited(documents: Documents, limit: int | None) -> Documents:
    """The first `limit` documents."""
    if limit is None:
        return documents
    return Documents(documents.name, identity([documents.fingerprint, limit]), lambda: islice(documents.read(), limit))


def text_of(row: Any, column: str, index: int, name: str) -> str:
    """The text of a row; nothing at all counts as an empty document.

    Raises:
        DBConvertError: there is no such column, or it holds something else.
    """
    if not isinstance(row, dict):
        raise DBConvertError(f"documents of {name} are {type(row).__name__}s, not dicts", hint="yield {'text': ...}")
    if column not in row:
        raise missing_column(column, row, name)
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise DBConvertError(
            f"column {column} of document {index} of {name} holds {type(value).__name__}, not text",
            hint="name the column of the text with data.text",
        )
    return value or ""


def missing_column(column: str, there: Iterable[str], name: str) -> DBConvertError:
    return DBConvertError(
        f"{name} has no column {column}", hint=f"set data.text to one of: {', '.join(map(str, there))}"
    )


def digest_of(texts: Iterable[str]) -> str:
    """SHA-256 of texts and of where each ends."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode(errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def read_utf8(path: Path) -> str:
    """A text file as it is, line ends included, without a byte order mark.

    Raises:
        DBConvertError: it is not UTF-8, or cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DBConvertError(
            f"{path} is not a text file in UTF-8",
            why=f"byte 0x{error.object[error.start]:02x} at position {error.start}",
            hint="convert it, e.g. iconv -f latin1 -t utf-8",
        ) from None
    except OSError as error:
        raise DBConvertError(f"cannot read {path}", why=error.strerror or str(error)) from None
