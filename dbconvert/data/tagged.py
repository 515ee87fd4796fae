"""Examples whose every position has a label, or none that counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dbconvert.anatomy import Anatomy
from dbconvert.data.examples import IGNORED, LABEL, Batch, find_columns
from dbconvert.data.puzzles import Puzzle
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError
from dbconvert.graph.values import example_shape
from dbconvert.plan import Target

COUNTED = 4096
"""Examples from which the frequencies of labels are taken."""


class Tagged(Dataset[Batch]):
    """A map-style dataset of dicts, read in batches.

    A batch holds the network's arguments under their names, and the labels, [N, S] long, or [N, S, L] where every
    position has several, under `LABEL`: -100 where a position has none.

    Args:
        target: classes, and labels of a position, that the network tells.

    Raises:
        DBConvertError: columns are missing, examples are not of one shape, or labels of another number of classes.
    """

    def __init__(self, dataset: Any, options: DataOptions, anatomy: Anatomy, target: Target) -> None:
        if len(dataset) == 0:
            raise DBConvertError(f"data source {options.source} is empty")
        self.dataset, self.target, self.label = dataset, target, options.label
        self.columns = find_columns(dataset[0], options, anatomy)
        if isinstance(dataset, Puzzle):
            refuse_other_puzzle(dataset, anatomy, target)
        self.shapes = {name: value.shape for name, value in self.read(0).items()}
        self.refuse_other_rank(anatomy)

    def refuse_other_rank(self, anatomy: Anatomy) -> None:
        for given in anatomy.inputs:
            if given.name in self.shapes and len(self.shapes[given.name]) != len(example_shape(given)):
                raise DBConvertError(
                    f"column {self.columns[given.name]} has shape {list(self.shapes[given.name])} an example, and the "
                    f"split saw {given.name} {list(given.shape)}",
                    hint="bring the data into that form, or split again with an example_inputs() that looks like it",
                )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Batch:
        if not isinstance(self.dataset, Puzzle):
            return default_collate([self.read(index) for index in indices])  # type: ignore[no-any-return]
        found = self.dataset.__getitems__(indices)
        return {**{name: found[column] for name, column in self.columns.items()}, LABEL: found[self.label]}

    def read(self, index: int) -> Batch:
        item = self.dataset[index]
        found = {name: tensor_of(item[column], column, index) for name, column in self.columns.items()}
        labels = found[LABEL] = tensor_of(item[self.label], self.label, index)
        self.refuse_other_labels(index, labels)
        for name, shape in getattr(self, "shapes", {}).items():
            if found[name].shape != shape:
                column = self.label if name == LABEL else self.columns[name]
                raise DBConvertError(
                    f"example {index} has {column} {list(found[name].shape)}, and example 0 has {list(shape)}",
                    hint="pad all to one length, labels with -100",
                )
        return found

    def refuse_other_labels(self, index: int, labels: Tensor) -> None:
        """Raises DBConvertError for labels that the network does not tell."""
        classes, several = self.target.classes, self.target.labels
        if labels.is_floating_point() or not labels.dim() or labels.shape[1:] != ((several,) if several > 1 else ()):
            what = "row of whole numbers" if several == 1 else f"table of whole numbers, [S, {several}]"
            raise DBConvertError(
                f"the label of example {index} is no {what}",
                hint=f"give {'one' if several == 1 else several} a position, -100 for none",
            )
        known = (labels != IGNORED).reshape(len(labels), -1)
        if not torch.equal(known.any(1), known.all(1)):
            raise DBConvertError(
                f"example {index} has a position that lacks some of its {several} labels",
                hint="give all labels of a position, or -100 for each of them",
            )
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise DBConvertError(
                f"example {index} has label {int(wrong[0])}, and the network has {classes} classes",
                hint="labels are 0 to K - 1, and -100 where a position has none",
            )

    def label_counts(self) -> Tensor:
        """How often each label occurs, [K] or [L, K]; from a fixed sample where there are many examples."""
        indices = torch.arange(len(self))
        if len(self) > COUNTED:
            indices = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:COUNTED]
        labels = self.__getitems__(indices.tolist())[LABEL]
        rows = labels.reshape(-1, self.target.labels).T
        counts = torch.stack([row[row != IGNORED].bincount(minlength=self.target.classes) for row in rows]).double()
        if not counts.any():
            raise DBConvertError("no position of the data has a label", hint="-100 means none; labels count from 0")
        return counts[0] if self.target.labels == 1 else counts


def tensor_of(value: Any, column: str, index: int) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise DBConvertError(
            f"{column} of example {index} is a {type(value).__name__}, not numbers",
            hint="map it to numbers in a file.py:function",
        ) from None


def refuse_other_puzzle(puzzle: Puzzle, anatomy: Anatomy, target: Target) -> None:
    """Raises DBConvertError where the network has too few classes, its table too few rows, or positions another number
    of labels than a puzzle asks for."""
    rows = anatomy.embedding.rows if anatomy.embedding is not None else puzzle.vocabulary
    if puzzle.classes > target.classes or puzzle.vocabulary > rows:
        raise DBConvertError(
            f"{puzzle.name} has {puzzle.vocabulary} tokens and {puzzle.classes} classes, and the network {rows} and "
            f"{target.classes}",
            hint="give a network with as many, or set data.puzzle.size and data.puzzle.steps",
        )
    if puzzle.labels != target.labels:
        raise DBConvertError(
            f"{puzzle.name} asks {puzzle.labels} of every position, and the network tells {target.labels}",
            hint="give a network that returns scores [N, S, L, K], or [N, S, K] where L is 1",
        )
