"""Text to tokens and back: bytes, characters, or a Transformers tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dbconvert.errors import DBConvertError
from dbconvert.schema import identity, record
from dbconvert.sources.tokenizers import fingerprint

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
PIECE = 1 << 20
KINDS = "byte, char, or a Transformers folder or hub id"


@record
class Description:
    """A tokenizer as it is stored with a run or a checkpoint.

    Args:
        fingerprint: equal for tokenizers that make the same tokens of every text.
        characters: the vocabulary of a `char` tokenizer.
        location: where a Transformers tokenizer was found; for people only.
    """

    kind: Literal["byte", "char", "transformers"]
    fingerprint: str
    size: int
    characters: str | None = None
    location: str | None = None


class Tokenizer(ABC):
    """Text to tokens and back.

    Attributes:
        size: tokens there are, K; every token is in 0..K-1.
        eos, pad, mask: the tokens that end a document, fill up a sequence and hide a token, where there are such.
        end: what is put after a document: its end token, or a line break where there is none.
        fingerprint: equal for tokenizers that make the same tokens of every text.
    """

    size: int
    eos: int | None
    pad: int | None
    mask: int | None
    end: list[int]
    fingerprint: str

    @abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, nothing added: no start or end token."""

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some tokens; what is no text becomes U+FFFD."""

    def unknown(self, text: str) -> list[str]:
        """The characters of a text that all become one token, each once; none where every text can be told."""
        return []

    @abstractmethod
    def describe(self) -> Description:
        """What `from_description` needs, as JSON can hold it."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what the description does not say into a folder: files of a Transformers tokenizer."""

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.encode_many([text])[0].tolist()
        return tokens


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 and nothing else."""

    def __init__(self) -> None:
        self.size, self.eos, self.pad, self.mask = 256, None, None, None
        self.end = [ord("\n")]
        self.fingerprint = identity(["byte"])

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(min(token, 255) for token in tokens).decode(errors="replace")

    def describe(self) -> Description:
        return Description("byte", self.fingerprint, self.size)

    def save(self, folder: Path) -> None:
        pass


class CharTokenizer(Tokenizer):
    """The characters of a vocabulary in their order, and a last token for all others.

    Args:
        characters: each once, in the order of their code points.
    """

    def __init__(self, characters: str) -> None:
        self.codes = np.array([ord(character) for character in characters], np.uint32)
        if not len(characters) or (np.diff(self.codes.astype(np.int64)) <= 0).any():
            raise DBConvertError("the characters of a char tokenizer are not in their order, each once")
        self.characters = characters
        self.size, self.eos, self.pad, self.mask = len(characters) + 1, None, None, None
        self.end = [characters.index("\n")] if "\n" in characters else []
        self.fingerprint = identity(["char", characters])

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.tokens_of(text) for text in texts]

    def tokens_of(self, text: str) -> np.ndarray:
        """Piece by piece: a whole corpus may be one document."""
        tokens = np.empty(len(text), np.min_scalar_type(self.size - 1))
        for start in range(0, len(text), PIECE):
            codes = np.frombuffer(text[start : start + PIECE].encode("utf-32-le"), np.uint32)
            places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
            tokens[start : start + PIECE] = np.where(self.codes[places] == codes, places, len(self.codes))
        return tokens

    def unknown(self, text: str) -> list[str]:
        return sorted(set(text) - set(self.characters))

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.characters[t] if t < len(self.characters) else UNKNOWN for t in tokens)

    def describe(self) -> Description:
        return Description("char", self.fingerprint, self.size, characters=self.characters)

    def save(self, folder: Path) -> None:
        pass


class TransformersTokenizer(Tokenizer):
    """A Transformers tokenizer, without the start and end tokens that it may add by itself.

    A document ends with its end token, or with its separator token where it has no end token (BERT).
    """

    def __init__(self, inner: Any, location: str) -> None:
        self.inner, self.location = inner, location
        vocabulary = inner.get_vocab()
        if not vocabulary:
            raise DBConvertError(f"the tokenizer of {location} has no tokens", hint=f"give {KINDS}")
        self.size = max(vocabulary.values()) + 1
        self.eos = inner.eos_token_id if inner.eos_token_id is not None else inner.sep_token_id
        self.pad, self.mask = inner.pad_token_id, inner.mask_token_id
        self.fingerprint = fingerprint(inner)
        self.end = [self.eos] if self.eos is not None else self.encode("\n")

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        batch = self.inner(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.array(tokens, np.int64) for tokens in batch["input_ids"]]

    def decode(self, tokens: Iterable[int]) -> str:
        text: str = self.inner.decode([int(token) for token in tokens], clean_up_tokenization_spaces=False)
        return text

    def describe(self) -> Description:
        return Description("transformers", self.fingerprint, self.size, location=self.location)

    def save(self, folder: Path) -> None:
        self.inner.save_pretrained(str(folder))
