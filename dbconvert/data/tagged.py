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

COUNTED = 4096
"""Examples from which the frequencies of labels are taken."""


class Tagged(Dataset[Batch]):
    """A map-style dataset of dicts, read in batches.

    A batch holds the network's arguments under their names, and the labels, [N, S] long, under `LABEL`: -100 where a
    position has none.

    Args:
        classes: that the network has.

    Raises:
        DBConvertError: columns are missing, examples are not of one shape, or labels of another number of classes.
    """

    def __init__(self, dataset: Any, options: DataOptions, anatomy: Anatomy, classes: int) -> None:
        if len(dataset) == 0:
            raise DBConvertError(f"data source {options.source} is empty")
        self.dataset, self.classes, self.label = dataset, classes, options.label
        self.columns = find_columns(dataset[0], options, anatomy)
        if isinstance(dataset, Puzzle):
            refuse_other_puzzle(dataset, anatomy, classes)
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
        if labels.dim() != 1 or labels.is_floating_point():
            raise DBConvertError(
                f"the label of example {index} is no row of whole numbers", hint="give one a position, -100 for none"
            )
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= self.classes))]
        if len(wrong):
            raise DBConvertError(
                f"example {index} has label {int(wrong[0])}, and the network has {self.classes} classes",
                hint="labels are 0 to K - 1, and -100 where a position has none",
            )
        for name, shape in getattr(self, "shapes", {}).items():
            if found[name].shape != shape:
                column = self.label if name == LABEL else self.columns[name]
                raise DBConvertError(
                    f"example {index} has {column} {list(found[name].shape)}, and example 0 has {list(shape)}",
                    hint="pad all to one length, labels with -100",
                )
        return found

    def label_counts(self) -> Tensor:
        """How often each label occurs, [classes]; from a fixed sample where there are many examples."""
        indices = torch.arange(len(self))
        if len(self) > COUNTED:
            indices = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:COUNTED]
        labels = self.__getitems__(indices.tolist())[LABEL]
        counts = labels[labels != IGNORED].bincount(minlength=self.classes).double()
        if not counts.any():
            raise DBConvertError("no position of the data has a label", hint="-100 means none; labels count from 0")
        return counts


def tensor_of(value: Any, column: str, index: int) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise DBConvertError(
            f"{column} of example {index} is a {type(value).__name__}, not numbers",
            hint="map it to numbers in a file.py:function",
        ) from None


def refuse_other_puzzle(puzzle: Puzzle, anatomy: Anatomy, classes: int) -> None:
    """Raises DBConvertError where the network has too few classes, or its table too few rows, for a puzzle."""
    rows = anatomy.embedding.rows if anatomy.embedding is not None else puzzle.vocabulary
    if puzzle.classes > classes or puzzle.vocabulary > rows:
        raise DBConvertError(
            f"{puzzle.name} has {puzzle.vocabulary} tokens and {puzzle.classes} classes, and the network {rows} and "
            f"{classes}",
            hint="give a network with as many, or set data.puzzle.size and data.puzzle.steps",
        )
