"""The built-in puzzles, on which depth pays: every position has a label that takes many steps to find.

Example i of a part is a function of the puzzle's name, the part and i alone, made when it is asked for, so that
training data is as good as unlimited. Parts are drawn apart: where examples are short, some occur in two parts.
Shapes: N examples, S positions, L labels of a position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import permutations
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dbconvert.data.batches import derive
from dbconvert.data.examples import IGNORED
from dbconvert.data_options import PuzzleOptions
from dbconvert.errors import UsageError

PARTS = {"train": 200_000, "validation": 1_000, "test": 2_000}
"""Examples of each."""
RULE = 110
TOKENS, LABEL = "tokens", "label"
"""Columns."""


class Puzzle(Dataset[dict[str, Tensor]], ABC):
    """One part of a puzzle: items {tokens: [S], label: [S], or [S, L] where L is more than 1}, both long.

    Args:
        options: what it leaves open is the puzzle's own.

    Attributes:
        vocabulary: tokens that there are.
        classes: labels that there are.
        labels: L.

    Raises:
        UsageError: the options are of no such puzzle.
    """

    name: ClassVar[str]
    vocabulary: int
    classes: int
    labels = 1

    def __init__(self, part: str, options: PuzzleOptions) -> None:
        self.options = options
        self.count = options.examples or PARTS[part] if part == "train" else PARTS[part]
        self.key = derive(0, "puzzle", self.name, part)
        self.settle(options)

    @abstractmethod
    def settle(self, options: PuzzleOptions) -> None:
        """Takes the options."""

    @property
    @abstractmethod
    def drawn(self) -> int:
        """Random numbers an example."""

    @abstractmethod
    def make(self, random: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [N, S], and of every position its labels and how many steps deep each lies, of random numbers
        [N, drawn]."""

    def asked(self, positions: int) -> np.ndarray:
        """Which positions have a label where there is a single answer, [S] bool."""
        return np.ones(positions, dtype=bool)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        tokens, labels, _ = self.made(indices)
        return {TOKENS: tokens, LABEL: labels}

    def depths(self, indices: list[int]) -> Tensor:
        """How many steps it takes to each label, of the labels' shape."""
        return self.made(indices)[2]

    def made(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        tokens, labels, depths = self.make(random_numbers(self.key, np.array(indices), self.drawn))
        if self.options.single:
            labels = np.where(self.asked(labels.shape[1]), labels, IGNORED)
        first, second, third = (torch.from_numpy(each.astype(np.int64)) for each in (tokens, labels, depths))
        return first, second, third

    def refuse(self, key: str, why: str, hint: str) -> UsageError:
        return UsageError(f"data.puzzle.{key} is nothing for {self.name}", why=why, hint=hint)


class S3(Puzzle):
    """The word problem of the symmetric group S3: the label at a position is the product of all elements up to it.

    An element is the number of its permutation of three things, in lexicographic order; (a b)(x) = a(b(x)).
    """

    name: ClassVar[str] = "s3"
    vocabulary = classes = 6

    def settle(self, options: PuzzleOptions) -> None:
        if options.steps is not None:
            raise self.refuse("steps", "there is a product at every position", "set data.puzzle.size, the elements")
        self.size = options.size or 12
        elements = list(permutations(range(3)))
        product = [[elements.index(tuple(a[b[x]] for x in range(3))) for b in elements] for a in elements]
        self.product = np.array(product)

    @property
    def drawn(self) -> int:
        return self.size

    def make(self, random: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = random % self.classes
        labels = tokens.copy()
        for i in range(1, self.size):
            labels[:, i] = self.product[labels[:, i - 1], tokens[:, i]]
        return tokens, labels, np.broadcast_to(1 + np.arange(self.size), tokens.shape)

    def asked(self, positions: int) -> np.ndarray:
        return np.asarray(np.arange(positions) == positions - 1)


class PermutationPowers(Puzzle):
    """Powers of a random permutation f of n points: position i holds f(i), and asks for f^j(i), j from 1 to p.

    A single answer is f^p(i) alone, at every position.
    """

    name: ClassVar[str] = "permutation-powers"

    def settle(self, options: PuzzleOptions) -> None:
        if isinstance(options.steps, tuple):
            raise self.refuse("steps", "all powers up to one are asked for", "give one number, the highest power")
        self.size, self.powers = options.size or 16, options.steps or 8
        if self.size < 2:
            raise self.refuse("size", "there is one permutation of one point", "give 2 or more")
        self.vocabulary = self.classes = self.size
        self.labels = 1 if options.single else self.powers

    @property
    def drawn(self) -> int:
        return self.size

    def make(self, random: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        power = image = np.asarray(random.argsort(1))
        found = [image]
        for _ in range(1, self.powers):
            power = np.take_along_axis(image, power, 1)
            found.append(power)
        if self.labels == 1:
            return image, power, np.full_like(power, self.powers)
        labels = np.stack(found, 2)
        return image, labels, np.broadcast_to(1 + np.arange(self.powers), labels.shape)


class Automaton(Puzzle):
    """A ring of cells under an elementary cellular automaton, rule 110: the label is the cell k steps later.

    Where k is drawn for every example, between a lowest and a highest one, every token tells it: it is the cell, 0 or
    1, plus 2 (k - lowest).
    """

    name: ClassVar[str] = "automaton"
    classes = 2

    def settle(self, options: PuzzleOptions) -> None:
        self.size = options.size or 24
        steps = options.steps or 4
        self.low, self.high = steps if isinstance(steps, tuple) else (steps, steps)
        if self.low > self.high:
            raise self.refuse("steps", f"{self.low} is more than {self.high}", "give the lowest and the highest number")
        if self.size < 3:
            raise self.refuse("size", "a cell has two neighbours", "give 3 or more")
        self.vocabulary = 2 * (self.high - self.low + 1)
        self.next = np.array([RULE >> i & 1 for i in range(8)])

    @property
    def drawn(self) -> int:
        return self.size + 1

    def make(self, random: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        cells = labels = random[:, 1:] >> 40 & 1
        steps = self.low + random[:, :1] % (self.high - self.low + 1)
        for k in range(self.high):
            after = self.next[np.roll(labels, 1, 1) * 4 + labels * 2 + np.roll(labels, -1, 1)]
            labels = np.where(k < steps, after, labels)
        return cells + 2 * (steps - self.low), labels, np.broadcast_to(steps, cells.shape)

    def asked(self, positions: int) -> np.ndarray:
        return np.asarray(np.arange(positions) == positions // 2)


PUZZLES: dict[str, type[Puzzle]] = {puzzle.name: puzzle for puzzle in (S3, PermutationPowers, Automaton)}


def random_numbers(key: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Of examples by their numbers, [N, count] int64, 0 or more: SplitMix64 (Steele et al. 2014) as a counter."""
    places = indices.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
    x: np.ndarray = np.uint64(key) + places * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((x ^ (x >> np.uint64(31))).view(np.int64) & np.int64(2**63 - 1))
