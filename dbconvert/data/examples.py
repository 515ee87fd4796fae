"""Examples as a network takes them: arguments of its forward by name, and a label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dbconvert.anatomy import Anatomy
from dbconvert.data.images import resized, to_picture, unit
from dbconvert.data.pictures import Kept, Pictures
from dbconvert.data_options import DataOptions, ImageOptions
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.graph.values import example_shape

LABEL = "__label__"
"""Key of the labels in a batch; no argument of a network is called this."""
IGNORED = -100
"""Label of a position that does not count, as padding."""
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
        self.image = image = options.image or ImageOptions()
        if isinstance(dataset, Pictures):
            dataset = dataset.resized(image.size, crop=image.crop)
        self.dataset = dataset
        self.classes = classes
        self.label = options.label
        if isinstance(dataset, Pictures):
            self.columns = {anatomy.inputs[0].name: "image"}
            self.refuse_other_labels(dataset.labels)
        else:
            self.columns = find_columns(self.read(0), options, anatomy, labelled=classes > 0)
        stored = hasattr(dataset, "select_columns") and not options.workers  # each worker would keep its own
        self.kept = Kept(len(dataset)) if stored and len(self.columns) == 1 else None
        self.seen = {} if options.latents else {given.name: example_shape(given) for given in anatomy.inputs}
        self.shared = {given.name for given in anatomy.inputs if given.shared} & self.columns.keys()
        self.first = self[0]
        self.refuse_other_rank(anatomy)
        self.refuse_other_channels()

    def refuse_other_rank(self, anatomy: Anatomy) -> None:
        """An example with other axes than the analysed one would be modulated along the wrong ones."""
        for given in anatomy.inputs:
            if given.name in self.first and self.first[given.name].dim() != len(example_shape(given)):
                raise DBConvertError(
                    f"a batch of column {self.columns[given.name]} has shape {[1, *self.first[given.name].shape]}, and "
                    f"the split saw {given.name} {list(given.shape)}",
                    hint="bring the data into that form, or split again with an example_inputs() that looks like it",
                )

    def refuse_other_channels(self) -> None:
        """Means of three channels would make three channels of one."""
        for value in (value for value in self.first.values() if value.dim() == 3):
            for name, numbers in (("mean", self.image.mean), ("std", self.image.std)):
                if len(numbers) not in (1, len(value)):
                    raise UsageError(
                        f"data.image.{name} has {len(numbers)} numbers, and pictures have {len(value)} channels",
                        hint="give one a channel, or one for all; data.image.mode=RGB reads grey pictures as colour",
                    )

    def refuse_other_labels(self, labels: Tensor) -> None:
        wrong = labels >= self.classes if self.classes else torch.zeros(0)
        for index in wrong.nonzero()[:1].flatten().tolist():
            raise self.outside(index, int(labels[index]))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Batch:
        if isinstance(self.dataset, Pictures):
            chosen = torch.tensor(indices)
            images, size = self.dataset.images.index_select(0, chosen), self.image.size
            images = images if size is None else resized(images, size)
            if self.image.mode == "RGB" and images.shape[1] == 1:
                images = images.expand(-1, 3, -1, -1)
            return {next(iter(self.columns)): unit(images), LABEL: self.dataset.labels[chosen]}
        return default_collate([self[index] for index in indices])  # type: ignore[no-any-return]

    def __getitem__(self, index: int) -> Batch:
        argument = next(iter(self.columns))
        if isinstance(self.dataset, Pictures):
            return {name: value[0] for name, value in self.__getitems__([index]).items()}
        kept = None if self.kept is None else self.kept.get(index)
        if kept is not None:
            return {argument: unit(kept[0]), LABEL: kept[1]}
        item = self.read(index)
        size, mode, crop = self.image.size, self.image.mode, self.image.crop
        read = {a: to_picture(item[column], size, mode, crop=crop) for a, column in self.columns.items()}
        label = self.read_label(item, index)
        if hasattr(self, "first"):
            self.refuse_other_shapes(read, index)
        if self.kept is not None:
            self.kept.put(index, read[argument], label)
        return {**{name: unit(value) for name, value in read.items()}, LABEL: label}

    def read(self, index: int) -> Any:
        """A row of the data.

        Raises:
            DBConvertError: its picture cannot be read.
        """
        try:
            return self.dataset[index]
        except OSError as error:  # what PIL raises for files that are no pictures, or are cut off
            raise DBConvertError(f"cannot read example {index} of the data", why=str(error).split("\n", 1)[0]) from None

    def refuse_other_shapes(self, taken: Batch, index: int) -> None:
        """Examples of a batch are stacked."""
        for argument, value in taken.items():
            if value.shape != self.first[argument].shape:
                raise DBConvertError(
                    f"example {index} has {self.columns[argument]} {list(value.shape)}, and example 0 has "
                    f"{list(self.first[argument].shape)}",
                    hint=made_equal(self.seen.get(argument, ())),
                )
            if argument in self.shared and not torch.equal(value, self.first[argument]):
                raise DBConvertError(
                    f"example {index} has other {self.columns[argument]} than example 0, and the network takes one "
                    f"{argument} for all examples of a batch",
                    hint="keep examples of one kind in a data source of their own",
                )

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
            raise self.outside(index, label)
        return torch.tensor(label)

    def outside(self, index: int, label: int) -> DBConvertError:
        return DBConvertError(f"example {index} has label {label}, and the network has {self.classes} classes")

    def label_counts(self) -> Tensor:
        """How often each label occurs, [classes]; from a fixed sample where there are many examples."""
        if isinstance(self.dataset, Pictures):
            return self.dataset.labels.bincount(minlength=self.classes).double()
        indices: Any = range(len(self))
        if len(self) > SAMPLED:
            indices = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:SAMPLED].tolist()
        column = self.dataset.select_columns([self.label]) if hasattr(self.dataset, "select_columns") else self.dataset
        labels = torch.stack([self.read_label(column[index], index) for index in indices])
        return labels.bincount(minlength=self.classes).double()


def made_equal(seen: tuple[int, ...]) -> str:
    """How pictures become those that a network takes, [C, H, W]; in general terms where that is no square picture."""
    square = len(seen) == 3 and seen[0] in (1, 3) and seen[1] == seen[2]
    size = f"size={seen[1]}" if square else "size"
    mode = "L reads colour ones as grey" if square and seen[0] == 1 else "RGB reads grey ones as colour"
    return f"data.image.{size} resizes pictures, data.image.mode={mode}"


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
