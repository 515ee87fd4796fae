"""assemble: from trained blocks to one checkpoint that carries its plan."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dbconvert.checkpoint import atomic_folder, load_tensors, read_metadata, save_checkpoint, sha256_file
from dbconvert.engine.network import own_key
from dbconvert.engine.package import (
    MODEL,
    NOISE,
    NOISE_KEY,
    PERIPHERY,
    PLAN,
    PLAN_KEY,
    RECIPE,
    WEIGHTS,
    block_file,
    read_noise,
)
from dbconvert.engine.runs import RunInfo, newest_complete, read_info
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Note, Reporter, Stage, silent
from dbconvert.graph.inject import PREFIX
from dbconvert.plan import NoiseFit, Plan, read_plan
from dbconvert.recipe import read_recipe
from dbconvert.schema import to_json
from dbconvert.sources.resolve import holds

DATA_KEY = "dbconvert.data"
SOURCE_SUFFIX = ".source"
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class FinishedRun:
    """A complete run of blocks, with its files checked."""

    folder: Path
    info: RunInfo
    plan: Plan
    noise: NoiseFit

    def part(self, name: str) -> dict[str, Tensor]:
        return load_tensors(self.folder / WEIGHTS / name)


def assemble(
    runs: Iterable[str] = (),
    *,
    out: str = "model.safetensors",
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    report: Reporter = silent,
) -> Path:
    """Puts trained blocks together into one safetensors file, or shards and an index.

    The plan, the noise and what the data looked like travel in its metadata. A network written in Python files is
    copied to `<name>.source/` beside it.

    Args:
        runs: one run of all blocks, or one run a block; the newest complete run of all blocks by default.
        force: replace a checkpoint that is there.

    Raises:
        UsageError: `out` exists already.
        DBConvertError: blocks are missing, doubled or damaged, or do not come from one split and one noise fit.
    """
    report(Stage("checking the blocks"))
    finished = [open_finished(Path(run)) for run in runs] or [open_finished(newest_complete())]
    refuse_mixture(finished)
    report(Note(f"from {', '.join(str(run.folder) for run in finished)}"))
    path = Path(out)
    if path.suffix != ".safetensors":
        raise UsageError(f"{out} does not end in .safetensors", hint="-o model.safetensors")
    refuse_existing(path, force=force)
    tensors = merged(finished)
    first = finished[0]
    check_shapes(tensors, first.plan, own=first.info.periphery == "frozen-target")
    report(Stage("writing the checkpoint"))
    recipe = read_recipe(first.folder / RECIPE)
    metadata = {
        PLAN_KEY: to_json(first.plan),
        NOISE_KEY: to_json(first.noise),
        DATA_KEY: to_json(recipe.data),
    }
    copy_source(Path(first.info.package) / MODEL, path, first.plan, force=force)
    return save_checkpoint(path, tensors, metadata, shard_bytes)


def refuse_existing(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", hint="give another -o, or --force to replace it")
    if path.exists() and PLAN_KEY not in read_metadata(path):
        raise UsageError(f"{path} was not written by dbconvert, so --force does not replace it")


def open_finished(folder: Path) -> FinishedRun:
    """A run whose files are whole.

    Raises:
        DBConvertError: the run is not complete, or a file is missing or damaged.
    """
    info = read_info(folder)
    if info.method != "blocks":
        raise DBConvertError(
            f"{folder} is a baseline ({info.method}), not blocks", hint="evaluate it with dbconvert eval"
        )
    if info.status != "complete":
        raise DBConvertError(f"{folder} is not complete", hint=f"dbconvert train {info.origin} --resume -o {folder}")
    for name, digest in info.files.items():
        path = folder / WEIGHTS / name
        if not path.is_file():
            raise DBConvertError(f"{path} is missing")
        if sha256_file(path) != digest:
            raise DBConvertError(
                f"{path} is damaged: its SHA-256 is not the one that training wrote",
                hint="copy the run again",
            )
        if read_metadata(path).get(PLAN_KEY) != info.split:
            raise DBConvertError(f"{path} comes from another split than its run")
    noise = read_noise(folder / NOISE)
    if noise is None or noise.identity != info.noise:
        raise DBConvertError(f"{folder / NOISE} is not the noise that the run was trained with")
    return FinishedRun(folder, info, read_plan(folder / PLAN), noise)


def refuse_mixture(finished: list[FinishedRun]) -> None:
    """All runs must come from one split and one noise fit and cover every block exactly once."""
    first = finished[0]
    for other in finished[1:]:
        pair = f"{first.folder} and {other.folder}"
        if other.info.split != first.info.split:
            raise DBConvertError(
                f"{pair} come from different splits", hint="train all blocks from copies of one package"
            )
        if other.info.noise != first.info.noise:
            raise DBConvertError(
                f"{pair} were trained with different noise fits",
                hint="copy noise.json to every package before training, or split with --data",
            )
    if len(finished) > 1 and any(run.info.periphery == "shared" for run in finished):
        raise DBConvertError(
            "runs that trained a shared periphery cannot be put together: each has its own",
            where=", ".join(str(run.folder) for run in finished),
            hint="train single blocks with train.periphery=frozen-target",
        )
    owners: dict[int, Path] = {}
    for run in finished:
        for block in run.info.blocks:
            if block in owners:
                raise DBConvertError(f"block {block} is in both {owners[block]} and {run.folder}")
            owners[block] = run.folder
    missing = [b for b in range(len(first.plan.blocks)) if b not in owners]
    if missing:
        raise DBConvertError(
            f"block {', '.join(map(str, missing))} is missing",
            where=", ".join(str(run.folder) for run in finished),
            hint=f"dbconvert train {first.info.package} --block {missing[0]} train.periphery=frozen-target",
        )


def merged(finished: list[FinishedRun]) -> dict[str, Tensor]:
    """The tensors of all blocks and of the periphery; what several runs hold must be one and the same."""
    tensors: dict[str, Tensor] = {}
    for run in finished:
        for name in [*(block_file(b) for b in run.info.blocks), PERIPHERY]:
            for key, tensor in run.part(name).items():
                if key in tensors and not torch.equal(tensors[key], tensor):
                    raise DBConvertError(
                        f"{key} differs between the runs",
                        where=str(run.folder),
                        why="z passes between blocks, so they must share one target table",
                    )
                tensors[key] = tensor
    return tensors


def check_shapes(tensors: Mapping[str, Tensor], plan: Plan, *, own: bool) -> None:
    """Keys and shapes must be those of the split, block by block."""
    wanted: dict[str, tuple[int, ...]] = {}
    for key, shape in plan.shapes.items():
        periphery = plan.block_of_key(key) is None and not key.startswith(PREFIX + ".")
        names = [own_key(b, key) for b in range(len(plan.blocks))] if own and periphery else [key]
        wanted.update(dict.fromkeys(names, tuple(shape)))
    missing, unknown = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unknown:
        raise DBConvertError(
            f"the blocks do not make up the network: {len(missing)} tensors missing, {len(unknown)} unknown",
            where=", ".join([*missing, *unknown][:4]),
        )
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != shape:
            raise DBConvertError(f"{key} has shape {list(tensors[key].shape)}, and the split says {list(shape)}")


def copy_source(model: Path, checkpoint: Path, plan: Plan, *, force: bool) -> None:
    """Python files lie beside the checkpoint; a Transformers configuration travels inside it."""
    folder = source_folder(checkpoint)
    if plan.source.kind != "model_file" or not model.is_dir() or holds(folder, plan.source):
        return
    with atomic_folder(folder, force=force) as temporary:
        shutil.copytree(model, temporary, dirs_exist_ok=True)


def source_folder(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name.partition(".safetensors")[0] + SOURCE_SUFFIX)
