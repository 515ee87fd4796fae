"""Accuracy by depth: how many steps an answer takes, and how often finished runs find it.

    python docs/measure_depth.py RUN [RUN ...] [--out FOLDER] [--steps N] [--beside TEXT]

Every run of a built-in puzzle is asked all examples of the test part, from z = 0; FOLDER (docs by default) gets
depth.json and depth.png. A run's line is named by its method, context, z, order, TEXT and seed. Rows that the JSON has
already stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot

from dbconvert.data.datasets import open_part
from dbconvert.data.examples import IGNORED, LABEL
from dbconvert.data.puzzles import Puzzle
from dbconvert.engine.load import Loaded, load
from dbconvert.engine.package import RECIPE
from dbconvert.engine.reading import open_examples
from dbconvert.errors import DBConvertError
from dbconvert.recipe import Recipe, read_recipe

BATCH = 250
Rows = dict[str, dict[str, dict[str, Any]]]
"""By puzzle and run."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Accuracy by depth of finished runs of puzzles.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--steps", type=int, help="network evaluations of a prediction, B + 1 by default")
    parser.add_argument("--beside", default="", help="What else these runs are to be told from others by.")
    given = parser.parse_args()
    path = given.out / "depth.json"
    rows: Rows = json.loads(path.read_text()) if path.exists() else {}
    for folder in given.runs:
        recipe, loaded = read_recipe(folder / RECIPE), load(folder)
        name = named(recipe, given.beside) + (f", {given.steps} evaluations" if given.steps else "")
        found = accuracy_by_depth(loaded, given.steps)
        rows.setdefault(puzzle_name(recipe), {})[name] = found
        told = " ".join(f"{value:.1f}" for value in found["by_depth"].values())
        sys.stdout.write(f"{puzzle_name(recipe)}, {name}: {found['accuracy']:.1f} % ({told})\n")
        path.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, given.out / "depth.png")
    return 0


def named(recipe: Recipe, beside: str) -> str:
    """A run among others of its puzzle."""
    form: str = recipe.train.method
    if form == "blocks":
        share = f" {recipe.train.mixed:g}" if recipe.train.z == "mixed" else ""
        order = f", {recipe.train.order}" if recipe.train.order != "random" else ""
        form = f"B = {recipe.split.blocks}, {recipe.split.context}, {recipe.train.z}{share}{order}"
    return ", ".join(filter(None, [form, beside, f"seed {recipe.seed}"]))


def puzzle_name(recipe: Recipe) -> str:
    puzzle = recipe.data.puzzle
    options = {} if puzzle is None else {k: v for k, v in vars(puzzle).items() if v and k != "examples"}
    return ", ".join([str(recipe.data.source), *(f"{key} {value}" for key, value in options.items())])


@torch.no_grad()
def accuracy_by_depth(loaded: Loaded, steps: int | None) -> dict[str, Any]:
    """`accuracy` over all labels, and `by_depth` over those that take so many steps, in per cent."""
    plan, data = loaded.network.plan, loaded.data
    part = str(data.test)
    puzzle = open_part(data, part)
    if not isinstance(puzzle, Puzzle):
        raise DBConvertError(f"data source {data.source} is no puzzle", hint="accuracy by depth is of built-in puzzles")
    examples = open_examples(data, part, plan, None)
    asked: dict[int, list[float]] = {}
    for start in range(0, len(examples), BATCH):
        indices = list(range(start, min(start + BATCH, len(examples))))
        batch = examples.__getitems__(indices)
        inputs, labels = loaded.network.task.arranged(batch, batch.pop(LABEL))
        right = loaded.network.task.correct(loaded.predict(inputs, steps=steps), labels)
        depths, counted = puzzle.depths(indices), labels != IGNORED
        for depth in depths[counted].unique().tolist():  # type: ignore[no-untyped-call]
            asked.setdefault(depth, []).extend(right[counted & (depths == depth)].float().tolist())
    every = [value for found in asked.values() for value in found]
    by_depth = {str(depth): 100 * sum(found) / len(found) for depth, found in sorted(asked.items())}
    return {"accuracy": 100 * sum(every) / len(every), "by_depth": by_depth}


def draw(rows: Rows, path: Path) -> None:
    """A panel a puzzle, a line a run."""
    figure, panels = pyplot.subplots(len(rows), 1, figsize=(8, 3.2 * len(rows)), squeeze=False, layout="constrained")
    for panel, (puzzle, runs) in zip(panels[:, 0], rows.items(), strict=True):
        for name, found in runs.items():
            depths = [int(depth) for depth in found["by_depth"]]
            panel.plot(depths, list(found["by_depth"].values()), marker="o", markersize=3, label=name)
        panel.set(title=puzzle, xlabel="steps that an answer takes", ylabel="accuracy, %", ylim=(0, 103))
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
