"""What a comparison found: a row a cell, and all of them as one table, in Markdown and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dbconvert.amounts import size
from dbconvert.engine.against import WHOLE
from dbconvert.engine.grid import Cell
from dbconvert.schema import record, to_data


@record
class Quality:
    """A figure of evaluation by which rows are compared, and whether it is a share of 1."""

    title: str
    share: bool


@record
class Point:
    """Quality on the way: after so many updates of the run, and so many seconds of training without evaluations."""

    update: int
    seconds: float
    quality: dict[str, float | None]


@record
class Row:
    """What became of a cell.

    Args:
        status: `not here` where the machine, the network or what is installed does not allow it.
        reason: why it failed, or is not here.
        figures: by the keys of COLUMNS.
        quality: by title; None where this form of training has no such figure.
        curve: quality along the way, where it was evaluated.
        metrics: all that its evaluation told, over so many examples.
        seconds: that the cell took, in the process that finished it.
    """

    cell: Cell
    status: Literal["done", "failed", "not here"]
    reason: str = ""
    qualities: tuple[Quality, ...] = ()
    quality: dict[str, float | None] = field(default_factory=dict)
    curve: tuple[Point, ...] = ()
    figures: dict[str, float | None] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    examples: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    seconds: float = 0.0

    def at(self, seconds: float) -> dict[str, float | None]:
        """The last quality until then."""
        before = [point.quality for point in self.curve if point.seconds <= seconds]
        return before[-1] if before else {}


@dataclass(frozen=True)
class Column:
    """A figure that is told of every row, if any row has it."""

    key: str
    title: str
    words: Callable[[float], str]
    about: Literal["memory", "time and work"]


def whole(value: float) -> str:
    return f"{value:,.0f}"


def hundredths(value: float) -> str:
    return f"{value:,.2f}"


def duration(value: float) -> str:
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


SPLIT = (
    Column("peak_parameters", "in parameters", size, "memory"),
    Column("peak_gradients", "in gradients", size, "memory"),
    Column("peak_optimizer", "in optimiser state", size, "memory"),
    Column("activations", "activations", size, "memory"),
    Column("other", "other", size, "memory"),
)
"""What the peak is made of."""
COLUMNS = (
    Column("peak", "peak memory", size, "memory"),
    *SPLIT,
    Column("state", "state in use", size, "memory"),
    Column("held", "state held", size, "memory"),
    Column("host", "host memory", size, "memory"),
    Column("step", "time a step", duration, "time and work"),
    Column("epoch", "time an epoch", duration, "time and work"),
    Column("parameters", "parameters", whole, "time and work"),
    Column("layers", "layers an update", whole, "time and work"),
    Column("passes", "with forward passes", hundredths, "time and work"),
    Column("updates", "updates", whole, "time and work"),
    Column("evaluations", "evaluations a prediction", whole, "time and work"),
)
"""`state` and `held` are those of older comparisons."""
NONE = "-"


@dataclass(frozen=True)
class Comparison:
    """All rows of a comparison.

    Args:
        folder: where everything is.
        rows: of the cells that were run or had been, in the order of the table.
        left: cells that were not come to.
        overrides: of every cell.
    """

    target: str
    folder: Path
    varied: Mapping[str, tuple[str, ...]]
    rows: tuple[Row, ...]
    left: int
    overrides: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "failed")

    @property
    def qualities(self) -> tuple[Quality, ...]:
        """Of the rows together: what any of them is compared by, and any tells."""
        told = {title for row in self.rows for title, value in row.quality.items() if value is not None}
        return tuple(dict.fromkeys(one for row in self.rows for one in row.qualities if one.title in told))

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(one for one in COLUMNS if any(row.figures.get(one.key) is not None for row in self.rows))

    @property
    def equal_time(self) -> dict[int, float]:
        """By seed: the seconds that end-to-end training took, evaluations not counted."""
        return {row.cell.seed: row.curve[-1].seconds for row in self.rows if row.curve and row.cell.baseline == WHOLE}

    def by_name(self) -> dict[str, list[Row]]:
        """The rows of all seeds, the grid before the baselines."""
        found: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.cell.baseline is not None):
            found.setdefault(row.cell.name, []).append(row)
        return found

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The headers, and a line of words for each name: medians, with the least and the most of several seeds."""
        headers = ["training", *(title for titles in self.groups().values() for title in titles)]
        return headers, [self.line(name, rows) for name, rows in self.by_name().items()]

    def groups(self) -> dict[str, list[str]]:
        """The headers after the first, by what they are about."""
        titles = [quality.title for quality in self.qualities]
        timed = [f"{title}, at equal time" for title in titles if self.equal_time]
        found = {"quality": [*titles, *timed] or ["quality"]}
        for column in self.columns:
            found.setdefault(column.about, []).append(column.title)
        return found

    def line(self, name: str, rows: list[Row]) -> list[str]:
        done = [row for row in rows if row.status == "done"]
        if not done:
            lacking = [NONE] * (len(self.groups()["quality"]) - 1 + len(self.columns))
            return [name, f"{rows[0].status}: {rows[0].reason.splitlines()[0]}", *lacking]
        lost = f" ({len(rows) - len(done)} of {len(rows)} seeds failed)" if len(done) < len(rows) else ""
        told = [spread([row.quality.get(q.title) for row in done], q) for q in self.qualities]
        if times := self.equal_time:
            now = [row.at(times[row.cell.seed]) if row.cell.seed in times else {} for row in done]
            told += [spread([one.get(q.title) for one in now], q) for q in self.qualities]
        found = []
        for column in self.columns:
            middle = median([row.figures.get(column.key) for row in done])
            found.append(NONE if middle is None else column.words(middle))
        return [name + lost, *told, *found]

    def notes(self) -> list[str]:
        """What is to be read beside the table."""
        done = [row for row in self.rows if row.status == "done"]
        seeds = ", ".join(map(str, dict.fromkeys(row.cell.seed for row in self.rows)))
        parts = {f"{row.cell.part}: {row.examples} examples" for row in done}
        asked = " ".join([self.target, *self.overrides])
        notes = [f"recipe {asked}; seeds {seeds}; evaluated on {', '.join(sorted(parts)) or 'nothing'}"]
        notes += sorted({machine_words(row) for row in done})
        if self.equal_time:
            after = ", ".join(f"{seconds:.1f} s (seed {seed})" for seed, seconds in self.equal_time.items())
            notes.append(f"equal time: the last evaluation within {after} of training, as long as end-to-end took")
        failures: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            if row.status != "done":
                reason = row.reason.splitlines()[0]
                failures.setdefault((row.status, row.cell.name, reason), []).append(str(row.cell.seed))
        notes += [f"{how}: {name}, seed {', '.join(seeds)}: {why}" for (how, name, why), seeds in failures.items()]
        notes += [f"cells that were not come to: {self.left}"] if self.left else []
        return notes

    def markdown(self) -> str:
        headers, lines = self.table()
        cells = [headers, ["---"] * len(headers), *lines]
        table = "\n".join("| " + " | ".join(word.replace("|", "\\|") for word in line) + " |" for line in cells)
        notes = "\n".join(f"- {note}" for note in self.notes())
        return f"{table}\n\n{notes}\n"

    def data(self) -> dict[str, Any]:
        headers, lines = self.table()
        return {
            "target": self.target,
            "overrides": list(self.overrides),
            "varied": to_data(self.varied),
            "left": self.left,
            "table": [dict(zip(headers, line, strict=True)) for line in lines],
            "rows": to_data(self.rows),
        }


def machine_words(row: Row) -> str:
    return "; ".join([row.device, ", ".join(f"{name} {number}" for name, number in row.versions.items())])


def known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def median(values: list[float | None]) -> float | None:
    return statistics.median(known(values)) if known(values) else None


def spread(values: list[float | None], quality: Quality) -> str:
    """The median over seeds, and between what values it lies."""
    there = known(values)
    if not there:
        return NONE
    middle, least, most = (
        f"{100 * value:.1f}" if quality.share else f"{value:.3f}"
        for value in (statistics.median(there), min(there), max(there))
    )
    unit = " %" if quality.share else ""
    return f"{middle}{unit} ({least} to {most})" if len(there) > 1 else middle + unit
