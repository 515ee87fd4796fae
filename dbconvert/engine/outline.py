"""outline: what a run would do and hold in memory, before it does it (train --dry-run)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dbconvert.engine.memory import MemoryReport, measure
from dbconvert.engine.prepare import Origin, prepare, read_origin, unread
from dbconvert.events import Note, Reporter, silent
from dbconvert.plan import NoiseFit, Plan
from dbconvert.recipe import Method, Recipe

CPU = torch.device("cpu")
CONTROLS: tuple[Method, ...] = ("end-to-end", "shallow")
LOOPED: tuple[Method, ...] = (*CONTROLS, "truncated-bptt")


@dataclass(frozen=True)
class Outline:
    """What a run would do.

    Args:
        length: updates or epochs a block, in words.
        memory: of the run.
        controls: of the same recipe with other methods; empty for baselines and single blocks.
    """

    plan: Plan
    noise: NoiseFit
    method: Method
    length: str
    memory: MemoryReport
    controls: dict[Method, MemoryReport]


def outline(
    target: str, *, overrides: Iterable[str] = (), block: int | None = None, report: Reporter = silent
) -> Outline:
    """Prepares a run as `train` would, measures one forward pass a unit, and writes nothing.

    Without data it measures on zeros of the shape of the split's example input, and shows the split's noise.
    """
    origin = read_origin(target, overrides)
    train = origin.recipe.train
    if origin.recipe.data.source is None:
        report(Note("no data is given (data.source): measured on inputs of the shape that the split saw"))
    elif unread(origin.recipe):
        report(Note("latents are not encoded for this: measured on inputs of the shape that the split saw"))
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(origin, Path(folder), block, report, rehearsal=True)
        memory = measure(prepared.job, CPU)
        controls: dict[Method, MemoryReport] = {}
        if train.method == "blocks" and block is None:
            for method in LOOPED if prepared.plan.anatomy.calls > 1 else CONTROLS:
                other = prepare(with_method(origin, method), Path(folder), None, silent, rehearsal=True)
                controls[method] = measure(other.job, CPU)
    planned = length(origin.recipe, prepared.job.steps)
    return Outline(prepared.plan, prepared.noise, train.method, planned, memory, controls)


def with_method(origin: Origin, method: Method) -> Origin:
    recipe = origin.recipe
    train = replace(recipe.train, method=method, inactive="resident", prefetch=False)
    return replace(origin, recipe=replace(recipe, train=train))


def length(recipe: Recipe, steps: int) -> str:
    """How long each block trains; epochs are updates only once the data is known."""
    updates = f"{steps} updates a block"
    if recipe.train.epochs is None:
        return updates
    return f"{recipe.train.epochs} epochs" + (" a block" if unread(recipe) else f", {updates}")
