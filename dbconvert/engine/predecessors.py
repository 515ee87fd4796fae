"""Finished runs of the blocks before one that trains alone, where it hears them or the sampler comes through them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dbconvert.checkpoint import load_checkpoint
from dbconvert.engine.finished import FinishedRun, open_finished, refuse_others
from dbconvert.engine.package import PERIPHERY, WEIGHTS, block_file
from dbconvert.engine.runs import RUN, RUNS, all_runs, read_info
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.plan import NoiseFit, Plan
from dbconvert.recipe import Recipe


def needed(plan: Plan, recipe: Recipe, block: int | None) -> range:
    """The blocks that have to be finished before one can train alone: all before it, or none."""
    told = plan.context != "raw" or recipe.train.z != "noised"
    return range(block if told and block is not None else 0)


def find(plan: Plan, recipe: Recipe, block: int | None, package: Path) -> list[FinishedRun]:
    """Whole runs of the needed blocks, first to last: those that the recipe names, or the newest under runs/.

    Raises:
        UsageError: one is missing, or is none of this split and of blocks with stems of their own.
        DBConvertError: one is damaged.
    """
    blocks, found = needed(plan, recipe, block), []
    named = [(Path(folder), read_info(Path(folder))) for folder in recipe.train.after]
    if named and not blocks:
        raise UsageError(
            "train.after names finished runs of earlier blocks, and nothing here needs them", hint="leave it out"
        )
    for k in blocks:
        fitting = [
            folder
            for folder, info in named or all_runs()
            if k in info.blocks and info.status == "complete" and info.method == "blocks"
            if info.split == plan.identity and info.periphery == "frozen-target"
        ]
        if not fitting:
            raise missing(plan, recipe, k, int(block or 0), package)
        found.append(open_finished(fitting[0].resolve()))
    refuse_others(found)
    return found


def refuse_other_noise(found: list[FinishedRun], noise: NoiseFit) -> None:
    """Raises DBConvertError where a block before was trained with other levels than those of now."""
    for run in found:
        if run.noise.identity != noise.identity:
            raise DBConvertError(
                f"{run.folder} was trained with another noise fit than the package has now",
                hint="train its block again, or copy the run's noise.json into the package",
            )


def missing(plan: Plan, recipe: Recipe, before: int, block: int, package: Path) -> UsageError:
    hears = f"it hears what block {block - 1} delivers (context `{plan.context}`)"
    comes = f"the sampler comes to it through the blocks before it (train.z={recipe.train.z})"
    where = "among the runs of train.after" if recipe.train.after else f"under {RUNS}/"
    return UsageError(
        f"block {block} cannot be trained alone yet: no finished run of block {before} of this package is {where}",
        why=comes if plan.context == "raw" else hears,
        hint=f"dbconvert train {package} --block {before} train.periphery=frozen-target, or name the runs with "
        f"train.after=[RUN, ..]; or train all blocks together, without --block",
    )


def told_of(found: list[FinishedRun], folder: Path) -> dict[str, str]:
    """SHA-256 of the weights of the blocks before, by file.

    Args:
        folder: of the run; where it has begun, they must be those that it began with.

    Raises:
        DBConvertError: they have moved on.
    """
    digests = {block_file(k): run.info.files[block_file(k)] for k, run in enumerate(found)}
    began = read_info(folder).before if (folder / RUN).is_file() else digests
    for name, digest in began.items():
        if digests.get(name) != digest:
            raise DBConvertError(
                f"{name} is not what {folder} began with: its weights have moved on",
                where=", ".join(str(run.folder) for run in found),
                hint="begin a new run of this block",
            )
    return digests


def tensors_of(found: list[FinishedRun]) -> dict[str, Tensor]:
    """Trained weights of the blocks before, and the target table that they share."""
    tensors: dict[str, Tensor] = {}
    for k, run in enumerate(found):
        for name in (block_file(k), PERIPHERY):
            tensors.update(load_checkpoint(run.folder / WEIGHTS / name)[0])
    return tensors
