"""Examples as a network takes them: arguments of its forward by name, and a label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dbconvert.anatomy import Anatomy
from dbconvert.data.digits import Digits
from dbconvert.data.images import to_image
from dbconvert.errors import DBConvertError
from dbconvert.recipe import DataOptions

LABEL = "__label__"
"""Key of the labels in a batch; no argument of a network is called this."""
SAMPLED = 10_000
Batch = dict[str, Tensor]


class Examples(Dataset[Batch]):
    """A map-style dataset of dicts, read in batches.

    A batch holds the network's arguments under their names and the labels, [N] long, under `LABEL`.

    Args:
        classes: that the network has; with 0 labels are not read.

    Raises:
        DBConvertError: columns are missing; the message lists those there are.
    """

    def __init__(self, dataset: Any, options: DataOptions, anatomy: Anatomy, classes: int) -> None:
        if len(dataset) == 0:
            raise DBConvertError(f"data source {options.source} is empty")
        self.dataset = dataset
        self.size = options.image.size if options.image else None
        self.classes = classes
        self.columns = find_columns(dataset[0], options, anatomy, labelled=classes > 0)
        self.label = options.label
        self.refuse_other_rank(anatomy)
        if isinstance(dataset, Digits) and classes and classes <= int(dataset.labels.max()):
            raise self.no_class(int(dataset.labels.argmax()), int(dataset.labels.max()))

    def refuse_other_rank(self, anatomy: Anatomy) -> None:
        """An example with other axes than the analysed one would be modulated along the wrong ones."""
        first = self.__getitems__([0])
        for given in anatomy.inputs:
            if given.name in first and first[given.name].dim() != len(given.shape):
                raise DBConvertError(
                    f"a batch of column {self.columns[given.name]} has shape {list(first[given.name].shape)}, and the "
                    f"split saw {given.name} {list(given.shape)}",
                    hint="bring the data into that form, or split again with an example_inputs() that looks like it",
                )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Batch:
        if isinstance(self.dataset, Digits) and self.size in (None, self.dataset.images.shape[-1]):
            chosen = torch.tensor(indices)
            argument = next(iter(self.columns))
            return {argument: self.dataset.images[chosen], LABEL: self.dataset.labels[chosen]}
        return default_collate([self[index] for index in indices])  # type: ignore[no-any-return]

    def __getitem__(self, index: int) -> Batch:
        item = self.dataset[index]
        taken = {argument: to_image(item[column], self.size) for argument, column in self.columns.items()}
        return {**taken, LABEL: self.read_label(item, index)}

    def read_label(self, item: dict[str, Any], index: int) -> Tensor:
        if not self.classes:
            return torch.tensor(0)
        try:
            label = int(item[self.label])
        except (TypeError, ValueError):
            raise DBConvertError(
                f"the label of example {index} is {item[self.label]!r}, not a whole number",
                hint="map the labels to 0..K-1 in a file.py:function",
            ) from None
        if not 0 <= label < self.classes:
            raise self.no_class(index, label)
        return torch.tensor(label)

    def no_class(self, index: int, label: int) -> DBConvertError:
        return DBConvertError(f"example {index} has label {label}, and the network has {self.classes} classes")

    def label_counts(self) -> Tensor:
        """How often each label occurs, [classes]; from a fixed sample where there are many examples."""
        if isinstance(self.dataset, Digits):
            return self.dataset.labels.bincount(minlength=self.classes).double()
        indices: Any = range(len(self))
        if len(self) > SAMPLED:
            indices = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:SAMPLED].tolist()
        column = self.dataset.select_columns([self.label]) if hasattr(self.dataset, "select_columns") else self.dataset
        labels = torch.stack([self.read_label(column[index], index) for index in indices])
        return labels.bincount(minlength=self.classes).double()


def find_columns(item: Any, options: DataOptions, anatomy: Anatomy, *, labelled: bool = True) -> dict[str, str]:
    """{argument of the network: column of the data}."""
    if not isinstance(item, dict):
        raise DBConvertError(
            f"examples are {type(item).__name__}s, not dicts", hint="yield {'image': ..., 'label': ...}"
        )
    there = ", ".join(item)
    if labelled and options.label not in item:
        raise DBConvertError(f"the data has no column {options.label}", hint=f"columns: {there}; set data.label")
    arguments = [given.name for given in anatomy.inputs]
    rest = [column for column in item if column != options.label]
    if options.input is not None:
        if options.input not in item:
            raise DBConvertError(f"the data has no column {options.input}", hint=f"columns: {there}")
        return {arguments[0]: options.input}
    if all(argument in item for argument in arguments):
        return {argument: argument for argument in arguments}
    if len(arguments) == 1 and len(rest) == 1:
        return {arguments[0]: rest[0]}
    raise DBConvertError(
        f"which column is the network's {arguments[0]}?", hint=f"set data.input to one of: {', '.join(rest)}"
    )
