"""The picture of a comparison: quality of every seed, memory by what it is for, and time, a line a row of the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dbconvert.engine.comparison import COLUMNS, SPLIT, Column, Comparison, Quality, Row, duration, known, median

MB = 1e6
OLDER = tuple(one for one in COLUMNS if one.key == "state")


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Writes a PNG."""
    from matplotlib.figure import Figure

    by_name = comparison.by_name()
    lines, qualities = list(by_name.values()), comparison.qualities
    count = len(qualities) + 2
    figure = Figure(figsize=(3 + 3.2 * count, 1.4 + 0.36 * max(len(by_name), 2)), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for panel, quality in zip(panels, qualities, strict=False):
        draw_quality(panel, lines, quality, comparison.equal_time)
    draw_memory(panels[-2], lines, [one for one in (*SPLIT, *OLDER) if one in comparison.columns])
    draw_time(panels[-1], lines)
    panels[0].set_yticks(range(len(by_name)), list(by_name), fontsize=8)
    panels[0].set_ylim(len(by_name) - 0.5, -0.5)
    figure.suptitle("; ".join(comparison.notes()[:2]), fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def draw_quality(panel: Any, lines: list[list[Row]], quality: Quality, times: Mapping[int, float]) -> None:
    """A dot a seed, a bar at the median, and a ring a seed at equal time."""
    factor = 100 if quality.share else 1
    for place, rows in enumerate(lines):
        values = [factor * value for value in known([row.quality.get(quality.title) for row in rows])]
        then = known([row.at(times.get(row.cell.seed, 0)).get(quality.title) for row in rows])
        colour = "C0" if rows[0].cell.baseline is None else "C1"
        panel.plot([factor * value for value in then], [place] * len(then), "o", color=colour, mfc="none")
        panel.plot(values, [place] * len(values), "o", color=colour, alpha=0.6)
        if values:
            panel.plot([statistics.median(values)], [place], "|", color=colour, markersize=16)
    panel.set_xlabel(quality.title + (", %" if quality.share else "") + (" (rings: at equal time)" if times else ""))
    panel.grid(axis="x", linewidth=0.4)


def draw_memory(panel: Any, lines: list[list[Row]], parts: Sequence[Column]) -> None:
    """What the peak is made of, one behind the other."""
    left = [0.0] * len(lines)
    for part in parts:
        widths = [(median([row.figures.get(part.key) for row in rows]) or 0.0) / MB for rows in lines]
        panel.barh(range(len(lines)), widths, left=left, height=0.6, label=part.title.removeprefix("in "))
        left = [before + width for before, width in zip(left, widths, strict=True)]
    if parts:
        panel.legend(fontsize=6)
    panel.set_xlabel("memory at the peak, MB")


def draw_time(panel: Any, lines: list[list[Row]]) -> None:
    """An epoch, with a step in words beside it; of older rows, which tell no epochs, a step."""
    for place, rows in enumerate(lines):
        step, epoch = (median([row.figures.get(key) for row in rows]) for key in ("step", "epoch"))
        if step is not None:
            panel.barh(place, epoch or step, color="0.6", height=0.6)
            panel.text(epoch or step, place, f" {duration(step)} a step", va="center", fontsize=7)
    panel.margins(x=0.3)
    panel.set_xlabel("seconds an epoch of as many layer evaluations")
