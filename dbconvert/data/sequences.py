"""Text as a network takes it: tokens as its argument, the same tokens as labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dbconvert.data import tokens as keys
from dbconvert.data.examples import IGNORED, LABEL, Batch
from dbconvert.data.tokens import TextExamples
from dbconvert.errors import DBConvertError

DOCUMENTS = "__documents__"
"""Key in a batch of the document that each position belongs to, [N, S]; no argument of a network is called this."""


class Sequences(Dataset[Batch]):
    """A part of a corpus in batches.

    A batch holds the tokens [N, S] under the network's argument and, with padding marked, under `LABEL`; and
    `DOCUMENTS` where tokens must not see other documents.

    Args:
        argument: of the network.
        classes: tokens that the network knows.
        aside: make padding a document of its own, for networks that see both ways.

    Raises:
        DBConvertError: the tokenizer knows more.
    """

    def __init__(self, text: TextExamples, argument: str, classes: int, *, aside: bool = False) -> None:
        if text.size > classes:
            raise DBConvertError(
                f"the tokenizer has {text.size} tokens, and the network's table {classes} rows",
                hint="name the network's own tokenizer with data.tokenizer=...",
            )
        self.text, self.argument, self.classes, self.aside = text, argument, classes, aside

    def __len__(self) -> int:
        return len(self.text)

    @property
    def characters_per_token(self) -> float:
        return self.text.characters_per_token

    def beginnings(self, count: int, length: int) -> Tensor:
        """The first `length` tokens of at most `count` examples that have so many, spread evenly over the part."""
        there = self.text.long_enough(length)
        chosen = [there[i * len(there) // count] for i in range(count)] if len(there) > count else there
        found: Tensor = self.text.__getitems__(chosen)[keys.TOKENS][:, :length] if chosen else torch.empty(0, length)
        return found

    def __getitems__(self, indices: list[int]) -> Batch:
        found = self.text.__getitems__(indices)
        tokens = found[keys.TOKENS]
        labels = tokens.masked_fill(~found[keys.VALID], IGNORED) if keys.VALID in found else tokens
        documents = {DOCUMENTS: found[keys.DOCUMENTS]} if keys.DOCUMENTS in found else {}
        if self.aside and keys.VALID in found:
            documents = {DOCUMENTS: torch.where(found[keys.VALID], documents.get(DOCUMENTS, 0), -1)}
        return {self.argument: tokens, LABEL: labels, **documents}

    def label_counts(self) -> Tensor:
        """How often each token occurs, [classes]."""
        counts = self.text.token_counts()
        return torch.cat([counts, counts.new_zeros(self.classes - len(counts))])


class Blank(Dataset[Batch]):
    """One batch of token 0, to measure memory without data."""

    def __init__(self, argument: str, examples: int, length: int) -> None:
        self.argument, self.examples, self.length = argument, examples, length

    def __len__(self) -> int:
        return self.examples

    def __getitems__(self, indices: list[int]) -> Batch:
        tokens = torch.zeros(len(indices), self.length, dtype=torch.long)
        return {self.argument: tokens, LABEL: tokens}

    def label_counts(self) -> Tensor:
        raise DBConvertError("there is no data to count")
