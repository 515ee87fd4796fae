"""compare: a recipe, the keys to vary and its baselines in, one table out; every cell in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from signal import Signals

from dbconvert.engine.cell import CELL, LOG, RECIPE, ROW, read_row, versions
from dbconvert.engine.comparison import Comparison, Row
from dbconvert.engine.comparison_picture import draw_comparison
from dbconvert.engine.grid import Cell, Planned, Request, lay_out, parse_vary
from dbconvert.engine.prepare import read_origin
from dbconvert.engine.runs import RUNS
from dbconvert.errors import UsageError
from dbconvert.events import Note, Reporter, Stage, silent
from dbconvert.files import MARKER, atomic_file, write_text
from dbconvert.schema import to_json, to_yaml

CELLS, TABLE, DATA, PICTURE = "cells", "table.md", "table.json", "table.png"


def compare(
    target: str,
    *,
    vary: Iterable[str] = (),
    seeds: int = 1,
    against: Iterable[str] = (),
    overrides: Iterable[str] = (),
    part: str | None = None,
    out: str | None = None,
    report: Reporter = silent,
) -> Comparison:
    """Trains and evaluates a grid of recipes, and the baselines of each, and writes a table of them.

    A cell that is finished is kept and one that was killed is resumed, so that the same command continues a comparison
    and one that varies more adds to it. The table is written again after every cell.

    Args:
        target: a recipe file, a package, or the name of a shipped recipe.
        vary: `key=value,value`: the product of all these is the grid.
        seeds: how many, from the recipe's on.
        against: baselines beside end-to-end training and the shallow control, by name.
        overrides: `key=value`, of every cell.
        part: of the data that is evaluated; the test part by default, else the validation part.
        out: the folder; runs/NAME-compare by default.

    Raises:
        UsageError: the request is wrong. What a single cell cannot do is its row.
    """
    request = Request(target, tuple(overrides), parse_vary(vary), seeds, tuple(against), part)
    folder, planned = plan_comparison(request, out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    rows = {one.cell.identity: row for one in planned if (row := kept(folder, one)) is not None}
    for index, one in enumerate(planned):
        if one.cell.identity in rows:
            continue
        report(Stage(f"cell {index + 1} of {len(planned)}: {one.cell.name}, seed {one.cell.seed}"))
        row = rows[one.cell.identity] = run(folder, one)
        if row.status == "failed":
            report(Note(f"{one.cell.name}, seed {one.cell.seed} failed: {row.reason}", warning=True))
        write(gathered(request, folder, planned, rows))
    comparison = gathered(request, folder, planned, rows)
    write(comparison)
    return comparison


def gathered(request: Request, folder: Path, planned: list[Planned], rows: dict[str, Row]) -> Comparison:
    there = tuple(rows[one.cell.identity] for one in planned if one.cell.identity in rows)
    return Comparison(request.target, folder, request.varied, there, len(planned) - len(there), request.overrides)


def plan_comparison(request: Request, out: str | None = None) -> tuple[Path, list[Planned]]:
    """The folder and the cells that `compare` would run, in order.

    Raises:
        UsageError: the request is wrong, or the folder holds something else.
    """
    planned = lay_out(request, versions())
    folder = Path(out) if out is not None else RUNS / f"{read_origin(request.target, request.overrides).name}-compare"
    if folder.exists() and not (folder / MARKER).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} holds something that no comparison wrote", hint="give another -o")
    return folder, planned


def cell_folder(folder: Path, cell: Cell) -> Path:
    words = re.sub(r"[^A-Za-z0-9.=-]+", "-", cell.name)[:60].strip("-")
    return folder / CELLS / f"{words}-seed{cell.seed}-{cell.identity[:10]}"


def status(folder: Path, cell: Cell) -> str:
    """How far a cell is: finished, failed, begun or new."""
    place = cell_folder(folder, cell)
    row = read_row(place)
    if row is not None:
        return {"done": "finished"}.get(row.status, row.status)
    return "begun" if place.exists() else "new"


def kept(folder: Path, planned: Planned) -> Row | None:
    """The row of a cell that is finished."""
    row = read_row(cell_folder(folder, planned.cell))
    return row if row is not None and row.status == "done" else None


def run(folder: Path, planned: Planned) -> Row:
    """The row of a cell that is run now."""
    place = cell_folder(folder, planned.cell)
    (place / ROW).unlink(missing_ok=True)
    write_text(place / RECIPE, to_yaml(planned.recipe))
    write_text(place / CELL, to_json(planned.cell))
    code = spawn(place)
    row = read_row(place)
    if row is None:
        row = Row(planned.cell, "failed", f"{ended(code)}; it said {place / LOG}")
        write_text(place / ROW, to_json(row))
    return row


def spawn(place: Path) -> int:
    """Runs the cell of a folder in a process of its own, which ends with this one; its exit code."""
    command = [sys.executable, "-m", "dbconvert.engine.cell", str(place)]
    with (place / LOG).open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            if process.stdin is not None:
                process.stdin.close()


def ended(code: int) -> str:
    """Why a process left no row."""
    return f"killed by {Signals(-code).name}" if code < 0 else f"the process ended with exit code {code}"


def write(comparison: Comparison) -> None:
    """The table as Markdown, JSON and a picture."""
    folder = comparison.folder
    write_text(folder / TABLE, comparison.markdown())
    write_text(folder / DATA, json.dumps(comparison.data(), indent=2, ensure_ascii=False) + "\n")
    with atomic_file(folder / PICTURE) as temporary:
        draw_comparison(comparison, temporary)
