"""Finished runs: whole, from one split and one noise fit, and together every block exactly once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dbconvert.checkpoint import read_metadata
from dbconvert.engine.package import NOISE, PERIPHERY, PLAN, PLAN_KEY, WEIGHTS, block_file, read_noise
from dbconvert.engine.periphery import own_key
from dbconvert.engine.runs import RUN, RunInfo, read_info
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.files import matches
from dbconvert.graph.inject import PREFIX
from dbconvert.plan import NoiseFit, Plan, read_plan
from dbconvert.tensorfile import Stored, read_header, same_bytes


@dataclass(frozen=True)
class FinishedRun:
    """A complete run of blocks, with its files checked."""

    folder: Path
    info: RunInfo
    plan: Plan
    noise: NoiseFit

    def part(self, name: str) -> dict[str, Stored]:
        return read_header(self.folder / WEIGHTS / name)[0]


def open_finished(folder: Path) -> FinishedRun:
    """A run whose files are whole.

    Raises:
        DBConvertError: the run is not complete, or a file is missing or damaged.
    """
    if (folder / PLAN).is_file() and not (folder / RUN).is_file():
        raise UsageError(
            f"{folder} is a package, whose blocks are not trained",
            hint=f"dbconvert train {folder}; or assemble {folder} --original gives the original network back",
        )
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
        if not matches(path, digest):
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
    refuse_others(finished)
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


def refuse_others(finished: list[FinishedRun]) -> None:
    """Raises DBConvertError where a block was trained after another predecessor than the one that is here."""
    files = {name: digest for run in finished for name, digest in run.info.files.items() if name != PERIPHERY}
    for run in finished:
        for name, digest in run.info.before.items():
            if files.get(name, digest) != digest:
                raise DBConvertError(
                    f"{run.folder} was trained after another {name.removesuffix('.safetensors')} than the one given",
                    why="it has learnt to use what that one delivers",
                    hint="assemble it with the runs that it was trained after, or train it again",
                )


def merged(finished: list[FinishedRun]) -> dict[str, Stored]:
    """Where the tensors of all blocks and of the periphery lie; what several runs hold must be one and the same."""
    tensors: dict[str, Stored] = {}
    for run in finished:
        for name in [*(block_file(b) for b in run.info.blocks), PERIPHERY]:
            for key, tensor in run.part(name).items():
                if key in tensors and not same_bytes(tensors[key], tensor):
                    raise DBConvertError(
                        f"{key} differs between the runs",
                        where=str(run.folder),
                        why="z passes between blocks, so they must share one target table",
                    )
                tensors[key] = tensor
    return tensors


def check_shapes(tensors: Mapping[str, Stored], plan: Plan, *, own: bool) -> None:
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
