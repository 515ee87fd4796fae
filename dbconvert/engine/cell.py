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

import torch

from dbconvert.engine.comparison import Quality, Row
from dbconvert.engine.convert import task_of
from dbconvert.engine.evaluate import Evaluation, evaluate
from dbconvert.engine.grid import Cell
from dbconvert.engine.load import read_run
from dbconvert.engine.memory import MemoryReport
from dbconvert.engine.methods import METHODS
from dbconvert.engine.runs import MEMORY, METRICS, RUN, RunInfo, read_info
from dbconvert.engine.train import train
from dbconvert.errors import DBConvertError
from dbconvert.files import write_text
from dbconvert.plan import Plan
from dbconvert.recipe import EvalOptions, Recipe, about_samples, read_recipe
from dbconvert.schema import parse, read_json, to_data, to_json

CELL, RECIPE, RUN_FOLDER, ROW, LOG = "cell.json", "cell.yaml", "run", "row.json", "log.txt"
LIBRARIES = ("dbconvert", "torch", "transformers")
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
        row = Row(cell, "failed", str(error))
    except Exception as error:
        traceback.print_exc()
        row = Row(cell, "failed", f"unexpected {type(error).__name__}: {error}; more in {folder / LOG}")
    write_text(folder / ROW, to_json(row))
    return row


def finished(folder: Path, cell: Cell, begun: float) -> Row:
    recipe, run = read_recipe(folder / RECIPE), folder / RUN_FOLDER
    if run.exists() and not (run / RUN).is_file():
        shutil.rmtree(run)
    if not (run / RUN).is_file() or read_info(run).status != "complete":
        none = [f"eval.{key}={json.dumps(value)}" for key, value in about_samples(recipe.eval).items()]
        train(str(folder / RECIPE), overrides=none, resume=run.exists(), out=str(run))
    evaluation = evaluate(str(run), part=cell.part, overrides=eval_overrides(recipe.eval))
    info, _, plan, _ = read_run(run)
    memory = parse(MemoryReport, read_json(run / MEMORY), file=str(run / MEMORY))
    figures = {**memory_figures(memory, info), **work_figures(plan, recipe, info), "step": step_seconds(run)}
    qualities, quality = headlines(plan, info, evaluation)
    return Row(
        cell,
        "done",
        qualities=qualities,
        quality=quality,
        figures=figures,
        metrics=evaluation.metrics,
        examples=evaluation.examples,
        versions=versions(),
        device=device_words(recipe),
        seconds=round(time.perf_counter() - begun, 1),
    )


def eval_overrides(options: EvalOptions) -> list[str]:
    return [f"eval.{key}={json.dumps(value)}" for key, value in to_data(options).items()]


def headlines(plan: Plan, info: RunInfo, evaluation: Evaluation) -> tuple[tuple[Quality, ...], dict[str, float | None]]:
    """The figures by which the plan's task compares networks, as the evaluation of this one told them."""
    found: dict[str, float | None] = {}
    for headline in task_of(plan).headlines:
        name = headline.blocks if METHODS[info.method].stepwise else headline.plain
        found[headline.title] = None if name is None else evaluation.metrics.get(name)
    qualities = tuple(Quality(one.title, one.blocks.startswith("accuracy")) for one in task_of(plan).headlines)
    return qualities, found


def memory_figures(memory: MemoryReport, info: RunInfo) -> dict[str, float | None]:
    """Of an update, and of the whole run; a baseline holds what it trains, and nothing of the blocks."""
    blocks = METHODS[info.method].blocks
    return {
        "activations": max(one.activations for one in memory.units),
        "state": max(one.state for one in memory.units),
        "held": memory.resident_state if blocks else sum(one.state for one in memory.units),
        "parameters": memory.resident_parameters if blocks else sum(one.trainable for one in memory.units),
    }


def work_figures(plan: Plan, recipe: Recipe, info: RunInfo) -> dict[str, float | None]:
    """Layers that run in an update (the most, over blocks), updates, and network evaluations of a prediction."""
    task, method = task_of(plan), METHODS[info.method]
    layers = method.layer_calls(plan)
    predicts = not (task.bounded or task.generative)
    return {
        "layers": layers,
        "passes": layers + method.forward_layers(task, plan, recipe) / FORWARD_AND_BACKWARD,
        "updates": info.updates,
        "evaluations": method.evaluations(task, plan, recipe) if predicts else None,
    }


def step_seconds(run: Path) -> float | None:
    """The median over an update and the loading of its batch; None where none was logged."""
    path = run / METRICS
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.is_file() else ())
    told = [line["seconds"] for line in lines if "seconds" in line]
    return statistics.median(told) if told else None


def device_words(recipe: Recipe) -> str:
    if torch.cuda.is_available() and not recipe.train.cpu:
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}"


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone: then the pipe that it reads closes."""

    def watch() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    run_cell(Path(sys.argv[1]))
