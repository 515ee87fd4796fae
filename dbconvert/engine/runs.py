"""Run folders: what a training run leaves behind, and how the newest one is found.

run.json        status, origin, blocks, SHA-256 of the weights
recipe.yaml     the recipe as it was resolved
plan.json       the split
noise.json      the noise that was used
memory.json     what an update holds, and the whole run
metrics.jsonl   one line a logged update or evaluation
package/        the package, where the recipe started from a source
checkpoints/    the newest state of training, to resume from
away/           blocks that do not train, with train.inactive=disk, while the run goes on
weights/        the result, once complete
"""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Literal

from dbconvert.errors import DBConvertError, UsageError
from dbconvert.files import MARKER, write_text
from dbconvert.recipe import Method
from dbconvert.schema import parse, read_json, record, to_json

RUNS = Path("runs")
RUN, MEMORY, METRICS, CHECKPOINTS = "run.json", "memory.json", "metrics.jsonl", "checkpoints"


@record
class RunInfo:
    """run.json.

    Args:
        origin: the recipe or package that was trained, as an absolute path.
        package: folder of the package.
        split: identity of the plan.
        noise: identity of the noise fit, the last one where it was fitted again.
        blocks: the blocks that are trained.
        block: the one that is trained alone, None for a run of all.
        epoch: updates in which one block, or a baseline, reads the training data once.
        files: SHA-256 of each file in weights/, once complete.
        before: that of the weights of earlier blocks which a block that is trained alone was told of.
    """

    status: Literal["running", "complete"]
    method: Method
    origin: str
    package: str
    split: str
    noise: str | None
    blocks: tuple[int, ...]
    block: int | None
    periphery: Literal["shared", "frozen-target"]
    updates: int
    epoch: int | None = None
    files: dict[str, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)


def new_run_folder(name: str) -> Path:
    """runs/NAME-001, or the next free number."""
    numbers = (re.fullmatch(rf"{re.escape(name)}-(\d+)", path.name) for path in RUNS.glob(f"{name}-*"))
    taken = [int(match[1]) for match in numbers if match]
    return RUNS / f"{name}-{max(taken, default=0) + 1:03d}"


def start_run(folder: Path, info: RunInfo) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    write_info(folder, info)


def write_info(folder: Path, info: RunInfo) -> None:
    write_text(folder / RUN, to_json(info))


def read_info(folder: Path) -> RunInfo:
    """run.json of a run.

    Raises:
        UsageError: the folder is not a run.
    """
    if not (folder / RUN).is_file():
        raise UsageError(f"{folder} is not a run: it has no {RUN}")
    return parse(RunInfo, read_json(folder / RUN), file=str(folder / RUN))


def all_runs() -> list[tuple[Path, RunInfo]]:
    """The runs under runs/, newest first."""
    folders = [path for path in RUNS.glob("*") if (path / RUN).is_file()]
    folders.sort(key=lambda path: (path / RUN).stat().st_mtime_ns, reverse=True)
    return [(folder, read_info(folder)) for folder in folders]


def newest_complete() -> Path:
    """The newest complete run of all blocks.

    Raises:
        DBConvertError: there is none; the message says what there is.
    """
    for folder, info in all_runs():
        if info.status == "complete" and info.method == "blocks" and info.block is None:
            return folder
    there = ", ".join(f"{folder.name} ({info.status})" for folder, info in all_runs()[:5]) or "nothing"
    raise DBConvertError(
        f"there is no complete run of all blocks under {RUNS}/",
        why=f"found: {there}",
        hint="train one, or name the runs to assemble",
    )


def newest_unfinished(origin: Path, block: int | None) -> Path:
    """The newest run of a recipe or package that did not finish: of all blocks, or of one alone.

    Raises:
        DBConvertError: there is none.
    """
    for folder, info in all_runs():
        if info.status == "running" and Path(info.origin) == origin.resolve() and info.block == block:
            return folder
    jobs = "all blocks" if block is None else f"block {block} alone"
    raise DBConvertError(
        f"there is no unfinished run of {jobs} of {origin} under {RUNS}/",
        hint="leave out --resume, or name the run with -o",
    )
