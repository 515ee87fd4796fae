"""Examples of text: batches of tokens, read from the memory-mapped cache.

Shapes: N examples, S tokens each (`data.length`), K tokens in the vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dbconvert.data.text import open_documents
from dbconvert.data.token_cache import TokenFile, cache_folder, tokenised
from dbconvert.data.tokenizers import Tokenizer
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Reporter, silent

TOKENS, DOCUMENTS, VALID = "tokens", "documents", "valid"
"""Keys of a batch."""
WINDOW, WINDOWS = 1 << 16, 1 << 10


class TextExamples(Dataset[dict[str, Tensor]]):
    """One part of a corpus, in examples of S tokens.

    A batch holds

    - `tokens` [N, S] long;
    - `documents` [N, S] long, where `data.documents` is `masked`: which document of the example, counted from 0, a
      token belongs to, its end token included;
    - `valid` [N, S] bool, where `data.pack` is false: False marks padding.

    Packed examples are whole: what is left over at the end of the part belongs to none.

    Attributes:
        size: K.
        length: S.

    Raises:
        DBConvertError: the part is shorter than one example, or a document is empty and would be padding only.
    """

    def __init__(self, file: TokenFile, tokenizer: Tokenizer, options: DataOptions, name: str) -> None:
        assert options.length is not None
        self.file, self.size, self.length = file, tokenizer.size, options.length
        self.packed, self.masked = options.pack, options.documents == "masked"
        self.filler = next(token for token in (tokenizer.pad, tokenizer.eos, 0) if token is not None)
        refuse_short(self, name) if self.packed else refuse_empty(file, name)

    def __len__(self) -> int:
        return self.file.entry.tokens // self.length if self.packed else self.file.entry.documents

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return self.chunks(indices) if self.packed else self.padded(indices)

    def chunks(self, indices: list[int]) -> dict[str, Tensor]:
        starts = np.array(indices)[:, None] * self.length
        positions = starts + np.arange(self.length)
        batch = {TOKENS: torch.from_numpy(self.file.tokens[positions].astype(np.int64))}
        if self.masked:
            batch[DOCUMENTS] = torch.from_numpy(self.document_of(positions) - self.document_of(starts))
        return batch

    def document_of(self, positions: np.ndarray) -> np.ndarray:
        """The number of the document to which the token at each position belongs."""
        return np.searchsorted(self.file.ends, positions, side="right")

    def padded(self, indices: list[int]) -> dict[str, Tensor]:
        tokens = np.full((len(indices), self.length), self.filler, np.int64)
        valid = np.zeros(tokens.shape, bool)
        for row, index in enumerate(indices):
            begin = self.file.ends[index - 1] if index else 0
            found = self.file.tokens[begin : min(self.file.ends[index], begin + self.length)]
            tokens[row, : len(found)] = found
            valid[row, : len(found)] = True
        batch = {TOKENS: torch.from_numpy(tokens), VALID: torch.from_numpy(valid)}
        return {**batch, DOCUMENTS: torch.zeros_like(batch[TOKENS])} if self.masked else batch

    def long_enough(self, tokens: int) -> list[int]:
        """The examples that have so many tokens, padding not counted."""
        if tokens > self.length:
            return []
        if self.packed:
            return list(range(len(self)))
        lengths = np.diff(self.file.ends, prepend=0)
        return [int(index) for index in np.nonzero(lengths >= tokens)[0]]

    def token_counts(self) -> Tensor:
        """How often each token occurs, [K] double; from windows at fixed places where there are very many."""
        tokens = self.file.tokens
        every = max(WINDOW, len(tokens) // WINDOWS)
        counts = np.zeros(self.size, np.int64)
        for start in range(0, len(tokens), every):
            counts += np.bincount(tokens[start : start + WINDOW], minlength=self.size)
        return torch.from_numpy(counts).double()

    @property
    def characters_per_token(self) -> float:
        """Turns nats a token into nats a character; end tokens count as tokens, not as characters."""
        return self.file.entry.characters / self.file.entry.tokens


def open_text(options: DataOptions, part: str, tokenizer: Tokenizer, report: Reporter = silent) -> TextExamples:
    """One part of a corpus of text, tokenised once and then read from the cache.

    Args:
        part: as `open_documents` takes it.

    Raises:
        UsageError: the options do not say what to read, or how long an example is.
        DBConvertError: the text cannot be read, is empty or too short.
    """
    if options.length is None:
        raise UsageError("how long is an example of text?", hint="set data.length, in tokens")
    documents = open_documents(options, part)
    file = tokenised(documents, tokenizer, cache_folder(options) / "tokens", report)
    return TextExamples(file, tokenizer, options, documents.name)


def refuse_short(examples: TextExamples, name: str) -> None:
    tokens = examples.file.entry.tokens
    if tokens < examples.length:
        raise DBConvertError(
            f"{name} is shorter than one example",
            why=f"it has {tokens} tokens, and data.length is {examples.length}",
            hint="give more text, or a smaller data.length",
        )


def refuse_empty(file: TokenFile, name: str) -> None:
    if file.entry.empty:
        raise DBConvertError(
            f"{name} has {file.entry.empty} empty documents, whose examples would be padding only",
            hint="remove them, or set data.pack=true, which leaves them out",
        )
