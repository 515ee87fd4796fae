"""Tokenised text on disk: made once for every text and tokenizer, memory-mapped, found again by its content.

A cached file holds all tokens of a part, documents after each other, in the smallest unsigned type that fits, and
then where each document ends. The JSON beside it is written last and has the file's digest: an entry is whole, or it
is made again.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from dbconvert.data.documents import Documents
from dbconvert.data.tokenizers import Tokenizer
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Reporter, Stage, silent
from dbconvert.files import atomic_file, matches, quick_digest, write_error, write_text
from dbconvert.schema import Count, identity, parse, read_json, record, to_json

FORMAT = 1
"""Raised whenever the same text and tokenizer would give another file."""
BATCH = 1 << 20
ENDS = np.dtype(np.int64)
Kind = Literal["uint8", "uint16", "uint32"]


@record
class Entry:
    """What a cached file holds.

    Args:
        digest: of the file, as `files.quick_digest` makes it.
        tokens: how many, those after each document included.
        documents: how many, without empty ones.
        characters: of the documents.
        empty: documents without a token, which are left out.
    """

    digest: str
    dtype: Kind
    tokens: Count
    documents: Count
    characters: Count
    empty: Count


class TokenFile:
    """The tokens of one part, mapped into memory by whoever reads them.

    Attributes:
        tokens: [T] unsigned.
        ends: [D] where each document ends, its end token included.
    """

    def __init__(self, path: Path, entry: Entry) -> None:
        self.path, self.entry = path, entry
        self.map()

    def map(self) -> None:
        tokens, documents = self.entry.tokens, self.entry.documents
        self.tokens = np.memmap(self.path, self.entry.dtype, "r", 0, (tokens,))
        self.ends = np.memmap(self.path, ENDS, "r", ends_at(tokens, np.dtype(self.entry.dtype)), (documents,))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "entry": self.entry}  # a map would be pickled as its content

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def cache_folder(options: DataOptions) -> Path:
    """Where tokenised text is kept: the options' folder, $DBCONVERT_CACHE, or the user's cache."""
    if options.cache is not None:
        return Path(options.cache).expanduser()
    if os.environ.get("DBCONVERT_CACHE"):
        return Path(os.environ["DBCONVERT_CACHE"]).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "dbconvert"


def tokenised(documents: Documents, tokenizer: Tokenizer, folder: Path, report: Reporter = silent) -> TokenFile:
    """The tokens of some documents, from the cache or made now. Of several processes one makes them.

    Raises:
        DBConvertError: there is no text, it cannot be read, or the cache cannot be written.
    """
    path = folder / f"{identity([FORMAT, documents.fingerprint, tokenizer.fingerprint])[:32]}.tokens"
    entry = sound_entry(path)
    if entry is None:
        with locked(path):
            entry = sound_entry(path)
            if entry is None:
                report(Stage(f"tokenising {documents.name}"))
                entry = write_entry(path, documents, tokenizer)
    return TokenFile(path, entry)


def locked(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path.with_suffix(".lock")).acquire()
    except OSError as error:
        told = write_error(error, path.parent)
        told.hint = "name another folder with data.cache=..., or in $DBCONVERT_CACHE"
        raise told from error


def sound_entry(path: Path) -> Entry | None:
    """The entry of a cached file, None where there is none or it is damaged."""
    described = path.with_suffix(".json")
    try:
        entry = parse(Entry, read_json(described), file=str(described))
    except UsageError:
        return None
    size = ends_at(entry.tokens, np.dtype(entry.dtype)) + entry.documents * ENDS.itemsize
    sound = path.is_file() and path.stat().st_size == size and matches(path, entry.digest)
    return entry if sound else None


def write_entry(path: Path, documents: Documents, tokenizer: Tokenizer) -> Entry:
    kind = smallest(tokenizer.size)
    dtype = np.dtype(kind)
    end = np.array(tokenizer.end, dtype).tobytes()
    ends, tokens, characters, empty = array("q"), 0, 0, 0
    with atomic_file(path, flush=False) as temporary:
        with temporary.open("wb") as file:
            for texts in batches(documents):
                characters += sum(map(len, texts))
                for found in tokenizer.encode_many(texts):
                    if not len(found):
                        empty += 1
                        continue
                    file.write(found.astype(dtype, copy=False).tobytes())
                    file.write(end)
                    tokens += len(found) + len(tokenizer.end)
                    ends.append(tokens)
            file.write(bytes(ends_at(tokens, dtype) - tokens * dtype.itemsize) + ends.tobytes())
        if not tokens:
            raise DBConvertError(f"{documents.name} holds no text")
        digest = quick_digest(temporary)
    entry = Entry(digest, kind, tokens, len(ends), characters, empty)
    write_text(path.with_suffix(".json"), to_json(entry))
    return entry


def smallest(size: int) -> Kind:
    """The smallest type that holds tokens 0..size-1."""
    return "uint8" if size <= 1 << 8 else "uint16" if size <= 1 << 16 else "uint32"


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of about BATCH characters."""
    texts: list[str] = []
    filled = 0
    for text in documents:
        texts.append(text)
        filled += len(text) + 1
        if filled >= BATCH:
            yield texts
            texts, filled = [], 0
    if texts:
        yield texts


def ends_at(tokens: int, dtype: np.dtype[Any]) -> int:
    """The byte at which the ends of documents begin."""
    return -(-tokens * dtype.itemsize // ENDS.itemsize) * ENDS.itemsize
