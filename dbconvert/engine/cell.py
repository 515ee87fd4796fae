"""One cell of a comparison, run in a process of its own: it trains, is evaluated, and leaves a row.

cell.json    what it is
cell.yaml    what it trains
run/         the run, to resume from where it was killed
row.json     the result
log.txt      what the process said
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dbconvert.engine.comparison import Point, Quality, Row
from dbconvert.engine.convert import task_of
from dbconvert.engine.evaluate import evaluate
from dbconvert.engine.grid import Cell
from dbconvert.engine.held import SPARE
from dbconvert.engine.load import read_run
from dbconvert.engine.memory import MemoryReport
from dbconvert.engine.methods import METHODS
from dbconvert.engine.metrics import Metrics
from dbconvert.engine.peaks import Peaks, preload
from dbconvert.engine.runs import MEMORY, METRICS, RUN, RunInfo, read_info
from dbconvert.engine.train import train
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.files import write_text
from dbconvert.plan import Plan
from dbconvert.recipe import EvalOptions, Recipe, about_samples, read_recipe
from dbconvert.schema import parse, read_json, to_data, to_json

CELL, RECIPE, RUN_FOLDER, ROW, LOG = "cell.json", "cell.yaml", "run", "row.json", "log.txt"
LIBRARIES = ("dbconvert", "torch", "transformers")
PARTS = ("parameters", "gradients", "optimizer")
Line = dict[str, Any]
"""Of metrics.jsonl."""
FORWARD_AND_BACKWARD = 3
"""What a layer's forward and backward pass cost, in forward passes."""


def versions() -> dict[str, str]:
    return {**{name: version(name) for name in LIBRARIES}, "python": platform.python_version()}


def read_row(folder: Path) -> Row | None:
    """What became of the cell of a folder; None while nothing has."""
    path = folder / ROW
    return parse(Row, read_json(path), file=str(path)) if path.is_file() else None


def run_cell(folder: Path) -> Row:
    """Trains and evaluates the cell of a folder, from where it was left, and writes its row, whatever happens.

    Raises:
        KeyboardInterrupt: no row is written then, and none where the process is killed.
    """
    cell = parse(Cell, read_json(folder / CELL), file=str(folder / CELL))
    begun = time.perf_counter()
    try:
        row = finished(folder, cell, begun)
    except DBConvertError as error:
        impossible = cell.optional and isinstance(error, UsageError)
        row = Row(cell, "not here" if impossible else "failed", str(error))
    except Exception as error:
        traceback.print_exc()
        row = Row(cell, "failed", f"unexpected {type(error).__name__}: {error}; more in {folder / LOG}")
    write_text(folder / ROW, to_json(row))
    return row


def finished(folder: Path, cell: Cell, begun: float) -> Row:
    recipe, run = read_recipe(folder / RECIPE), folder / RUN_FOLDER
    peaks = Peaks(on_cuda(recipe))
    if run.exists() and not (run / RUN).is_file():
        shutil.rmtree(run)
    if not (run / RUN).is_file() or read_info(run).status != "complete":
        none = [f"eval.{key}={json.dumps(value)}" for key, value in about_samples(recipe.eval).items()]
        with peaks:
            train(str(folder / RECIPE), overrides=none, resume=run.exists(), out=str(run), report=peaks)
    evaluation = evaluate(str(run), part=cell.part, overrides=eval_overrides(recipe.eval))
    info, _, plan, _ = read_run(run)
    memory = parse(MemoryReport, read_json(run / MEMORY), file=str(run / MEMORY))
    lines = logged(run)
    figures = {
        **memory_figures(memory, lines, peaks),
        **work_figures(plan, recipe, info),
        **time_figures(recipe, info, lines),
    }
    return Row(
        cell,
        "done",
        qualities=tuple(Quality(one.title, one.blocks.startswith("accuracy")) for one in task_of(plan).headlines),
        quality=headlines(plan, info, evaluation.metrics),
        curve=tuple(
            Point(line["update"], line["trained"], headlines(plan, info, line["eval"]))
            for line in lines
            if "eval" in line
        ),
        figures=figures,
        metrics=evaluation.metrics,
        examples=evaluation.examples,
        versions=versions(),
        device=device_words(recipe),
        seconds=round(time.perf_counter() - begun, 1),
    )


def eval_overrides(options: EvalOptions) -> list[str]:
    """A cell is evaluated on the whole part once it is trained."""
    return [f"eval.{key}={json.dumps(value)}" for key, value in {**to_data(options), "examples": 0}.items()]


def headlines(plan: Plan, info: RunInfo, metrics: Metrics) -> dict[str, float | None]:
    """The figures by which the plan's task compares networks, as an evaluation of this one told them, by title."""
    found: dict[str, float | None] = {}
    for headline in task_of(plan).headlines:
        name = headline.blocks if METHODS[info.method].stepwise else headline.plain
        found[headline.title] = None if name is None else metrics.get(name)
    return found


def memory_figures(memory: MemoryReport, lines: list[Line], peaks: Peaks) -> dict[str, float | None]:
    """Bytes at the peak of an update, by what they are for; on a CPU the peak is what is counted."""
    seen = [line["holds"] for line in lines if "holds" in line]
    activations = max(one.activations for one in memory.units)
    found: dict[str, float | None] = {"activations": activations, "host": peaks.host}
    found["parameters"] = memory.used_parameters
    if seen:
        most = max(seen, key=lambda one: sum(one[part] for part in PARTS))
        found.update({f"peak_{part}": most[part] for part in PARTS})
        counted = found["peak"] = activations + sum(most[part] for part in PARTS)
        if peaks.device is not None:
            found["peak"] = max(counted, peaks.device - most[SPARE])
            found["other"] = found["peak"] - counted
    return found


def work_figures(plan: Plan, recipe: Recipe, info: RunInfo) -> dict[str, float | None]:
    """Layers that run in an update (the most, over blocks), updates, evaluations of a prediction."""
    task, method = task_of(plan), METHODS[info.method]
    layers = method.layer_calls(plan)
    predicts = not (task.bounded or task.generative)
    return {
        "layers": layers,
        "passes": layers + method.forward_layers(task, plan, recipe) / FORWARD_AND_BACKWARD,
        "updates": info.updates,
        "evaluations": method.evaluations(task, plan, recipe) if predicts else None,
    }


def time_figures(recipe: Recipe, info: RunInfo, lines: list[Line]) -> dict[str, float | None]:
    """Medians over updates with the loading of their batches: of one, and of those in which every layer that learns
    reads the data once. None where none was logged."""
    told = [line["seconds"] for line in lines if "seconds" in line]
    if not told or info.epoch is None:
        return {}
    step = statistics.median(told)
    steps = recipe.train.steps or (recipe.train.epochs or 1) * info.epoch
    return {"step": step, "epoch": step * info.epoch * info.updates / steps}


def logged(run: Path) -> list[Line]:
    path = run / METRICS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def on_cuda(recipe: Recipe) -> bool:
    return torch.cuda.is_available() and not recipe.train.cpu


def device_words(recipe: Recipe) -> str:
    if on_cuda(recipe):
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}"


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone: then the pipe that it reads closes."""

    def peaks() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=peaks, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    preload()
    run_cell(Path(sys.argv[1]))
