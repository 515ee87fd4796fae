"""States that finished blocks bring to the next one, of fixed examples: run once, kept on disk, and read again.

A block whose z are all the sampler's own (train.z=on-policy, from z = 0) is brought the same for an example every time,
and so is what it hears with it: this may be kept. Where z are noised, what is heard depends on the noise drawn for the
blocks before, anew in every update; kept, it would be one draw an example for the whole training.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbconvert.amounts import size
from dbconvert.data.batches import Data, in_order, seed_all
from dbconvert.data.content import content_digest
from dbconvert.data.examples import LABEL, Batch
from dbconvert.data.images import entering
from dbconvert.engine.cascade import Cascade, at_rest
from dbconvert.engine.listening import Arrival
from dbconvert.engine.method import Job
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.on_policy import Denoised, met, own_state, usual
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Advance, Note, Reporter, Stage
from dbconvert.files import atomic_folder
from dbconvert.plan import Plan
from dbconvert.recipe import Recipe
from dbconvert.schema import identity, parse, read_json, record, to_json
from dbconvert.tasks.base import Inputs
from dbconvert.tasks.registry import named

SHEET, Z, HEARD = "states.json", "z.npy", "heard.npy"
INDEX = "__index__"
"""Key of the examples' numbers in a batch; no argument of a network is called this."""
CANNOT = "train.states keeps what earlier blocks bring to a block, and here it cannot"
SPARE = 1 << 28
"""Bytes that are left free on a disk."""


@record
class Sheet:
    """states.json: what the states of a folder are of.

    Args:
        weights: SHA-256 of the files of the blocks that ran.
        data: digest of the examples, and of how pictures are normalised.
    """

    split: str
    block: int
    noise: str
    weights: dict[str, str]
    data: str
    precision: str
    examples: int


def refuse_states(plan: Plan, recipe: Recipe, block: int | None) -> None:
    """Raises UsageError where states cannot be kept, or would be wrong."""
    if recipe.train.states is None:
        return
    train, data, why, hint = recipe.train, recipe.data, "", "leave train.states out"
    if not block:
        why = "they are kept for a block that trains alone, after finished ones: all others move meanwhile"
        hint = "train it with --block, or leave train.states out"
    elif own_state(named(str(plan.task))) is not Denoised:
        why = f"task {plan.task} sets out from a noised truth, drawn anew in every update"
    elif train.z != "on-policy":
        why = f"with train.z={train.z} they depend on noise, drawn anew in every update: kept, it would be one draw"
        hint = "train with train.z=on-policy, or leave train.states out"
    elif data.flip or data.randaugment is not None or data.latents is not None:
        drawn = "the latents" if data.latents is not None else "the pictures' augmentation"
        why = f"{drawn} of an example are drawn anew in every update"
    if why:
        raise UsageError(CANNOT, why=why, hint=hint)


# -- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbered:
    """Examples that say their numbers under INDEX."""

    examples: Data

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: list[int]) -> Batch:
        return {**self.examples.__getitems__(indices), INDEX: torch.tensor(indices)}

    def label_counts(self) -> Tensor:
        return self.examples.label_counts()


@dataclass(frozen=True)
class KeptStates:
    """What reaches a block, by example.

    Args:
        z: [N, ..]. heard: [N, rows, ..], the batch axis first; None where nothing is heard.
    """

    z: Any
    heard: Any | None

    def at(self, index: Tensor, device: torch.device, batch_axis: int) -> tuple[Tensor, Tensor | None]:
        rows = index.cpu().numpy()
        z = torch.from_numpy(self.z[rows]).to(device)
        if self.heard is None:
            return z, None
        heard = torch.from_numpy(self.heard[rows]).to(device).flatten(0, 1)
        return z, heard if heard.dim() == 2 else heard.movedim(0, batch_axis)


@dataclass(frozen=True)
class FromKept(Cascade):
    """Runs no earlier block: what they bring is read; steps of the block itself are taken as ever."""

    z: Tensor = field(default_factory=lambda: torch.empty(0))
    heard: Tensor | None = None

    def __call__(self, network: BlockwiseNetwork, block: int, arrival: Arrival, labels: Tensor) -> Arrival:
        assert self.own is not None
        with at_rest(network):
            state = Denoised(network, self.intervals, block, self.own, self.generator, self.z)
            return state.arrive(Arrival(arrival.inputs, arrival.z, arrival.sigma, self.heard))


def instead(job: Job, cascade: Cascade | None, inputs: Inputs) -> tuple[Cascade | None, Inputs]:
    """What runs before a block: the cascade, or what is kept of it; and the inputs without the examples' numbers."""
    if job.states is None or INDEX not in inputs:
        return cascade, {name: value for name, value in inputs.items() if name != INDEX}
    rest = dict(inputs)
    index = rest.pop(INDEX)
    z, heard = job.states.at(index, index.device, job.network.plan.anatomy.axes.batch)
    return FromKept(job.intervals, torch.ones_like(index, dtype=torch.bool), None, z, heard), rest


# -- writing ----------------------------------------------------------------------------------------------------


def keep_states(job: Job, before: dict[str, str], autocast: AbstractContextManager[Any], report: Reporter) -> None:
    """Gives a job its states: those of the folder that its recipe names, which is made where it is not there yet.

    Raises:
        UsageError: the examples are not the same every time they are read.
        DBConvertError: the folder holds other states, or the disk has no room.
    """
    folder = Path(str(job.recipe.train.states))
    (block,) = job.units
    data = identity([fixed_digest(job.examples), job.recipe.data.image])
    plan, precision = job.network.plan, job.recipe.train.precision
    sheet = Sheet(plan.identity, block, job.noise.identity, before, data, precision, len(job.examples))
    if folder.exists():
        refuse_others(folder, sheet)
    else:
        with autocast:
            write(job, block, folder, sheet, report)
    z, heard = (np.load(p, mmap_mode="r") if p.exists() else None for p in (folder / Z, folder / HEARD))
    job.states = KeptStates(z, heard)
    job.examples = Numbered(job.examples)


def fixed_digest(examples: Data) -> str:
    """Of examples that are the same every time."""
    found = []
    for seed in (0, 1):
        seed_all(seed)
        found.append(content_digest(examples))
    if found[0] != found[1]:
        raise UsageError(
            CANNOT,
            why="the data gives other examples under the same numbers every time it is read",
            hint="leave train.states out, or take random transforms out of the data's function",
        )
    return found[0]


def refuse_others(folder: Path, sheet: Sheet) -> None:
    """Raises DBConvertError for states that are not of this block, on these examples, after these weights."""
    path = folder / SHEET
    if not path.is_file():
        raise UsageError(f"{folder} exists already and holds no states", hint="give another folder in train.states")
    kept = parse(Sheet, read_json(path), file=str(path))
    moved = [name for name, digest in sheet.weights.items() if kept.weights.get(name) != digest]
    words = {"split": "split", "block": "block", "noise": "noise fit", "data": "data", "precision": "precision"}
    other = [word for key, word in words.items() if getattr(kept, key) != getattr(sheet, key)]
    if moved or other or kept.examples != sheet.examples:
        what = f"{', '.join(moved)} has moved on" if moved else f"another {(other or ['data'])[0]}"
        raise DBConvertError(
            f"{folder} holds other states than this training wants: {what}",
            hint="give another folder in train.states, or remove this one: it is made again",
        )


def write(job: Job, block: int, folder: Path, sheet: Sheet, report: Reporter) -> None:
    count, batches = len(job.examples), brought(job, block)
    arrays: dict[str, Any] = {}
    done = 0
    with atomic_folder(folder) as temporary:
        for z, heard in batches:
            parts = {Z: z} if heard is None else {Z: z, HEARD: heard}
            if not arrays:
                shapes = {name: (count, *value.shape[1:]) for name, value in parts.items()}
                announce(folder, shapes, report)
                arrays = {
                    name: np.lib.format.open_memmap(temporary / name, mode="w+", dtype=np.float32, shape=shape)
                    for name, shape in shapes.items()
                }
                report(Stage("keeping states", count))
            for name, value in parts.items():
                arrays[name][done : done + len(z)] = value.float().cpu().numpy()
            done += len(z)
            report(Advance(len(z)))
        for array in arrays.values():
            array.flush()
        (temporary / SHEET).write_text(to_json(sheet), encoding="utf-8")


def announce(folder: Path, shapes: dict[str, tuple[int, ...]], report: Reporter) -> None:
    """Says how much is going to be written, and refuses it where there is no room."""
    wanted = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    free = shutil.disk_usage(folder.parent).free
    words = f"states of {next(iter(shapes.values()))[0]} examples: {size(wanted)} in {folder}"
    if wanted + SPARE > free:
        raise DBConvertError(f"no room for {words}", why=f"{size(free)} are free", hint="leave train.states out")
    report(Note(words))


def brought(job: Job, block: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """z and what is heard of all examples, in their order, batch axis first; of heard [N, rows, ..]."""
    network, task, axes = job.network, job.network.task, job.network.plan.anatomy.axes
    device = next(network.parameters()).device
    top = met(usual(task, job.intervals), job.intervals, block)[0]
    for loaded in in_order(job.examples, job.recipe.train.batch):
        moved = {name: value.to(device) for name, value in loaded.items()}
        labels = moved.pop(LABEL)
        ready = {name: entering(value, job.recipe.data.image) for name, value in moved.items()}
        inputs, labels = task.arranged(ready, labels)
        own = torch.ones(len(labels), dtype=torch.bool, device=device)
        sigma = torch.full(tuple(task.level_shape(labels)), top, device=device)
        there = Arrival(inputs, torch.zeros(task.target_shape(inputs), device=device), sigma)
        found = Cascade(job.intervals, own)(network, block, there, labels)
        heard = found.heard
        if heard is not None:
            heard = heard if heard.dim() == 2 else heard.movedim(axes.batch, 0)
            heard = heard.reshape(len(labels), -1, *heard.shape[1:])
        yield found.z, heard
