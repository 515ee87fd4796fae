"""The picture of a comparison: quality of every seed, and what an update holds, a line a row of the table."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from dbconvert.engine.comparison import Comparison, Quality, Row, duration, known

MB = 1e6


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Writes a PNG."""
    from matplotlib.figure import Figure

    by_name = comparison.by_name()
    qualities = comparison.qualities
    figure = Figure(figsize=(3 + 3.2 * (len(qualities) + 1), 1.4 + 0.36 * max(len(by_name), 2)), layout="constrained")
    panels = figure.subplots(1, len(qualities) + 1, sharey=True, squeeze=False)[0]
    for panel, quality in zip(panels, qualities, strict=False):
        draw_quality(panel, list(by_name.values()), quality)
    draw_memory(panels[-1], list(by_name.values()))
    panels[0].set_yticks(range(len(by_name)), list(by_name), fontsize=8)
    panels[0].set_ylim(len(by_name) - 0.5, -0.5)
    figure.suptitle("; ".join(comparison.notes()[:2]), fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def draw_quality(panel: Any, lines: list[list[Row]], quality: Quality) -> None:
    """A dot a seed, and a bar at the median."""
    factor = 100 if quality.share else 1
    for place, rows in enumerate(lines):
        values = [factor * value for value in known([row.quality.get(quality.title) for row in rows])]
        colour = "C0" if rows[0].cell.baseline is None else "C1"
        panel.plot(values, [place] * len(values), "o", color=colour, alpha=0.6)
        if values:
            panel.plot([statistics.median(values)], [place], "|", color=colour, markersize=16)
    panel.set_xlabel(quality.title + (", %" if quality.share else ""), fontsize=8)
    panel.grid(axis="x", linewidth=0.4)


def draw_memory(panel: Any, lines: list[list[Row]]) -> None:
    """State in use and activations of an update, one behind the other, with the time of a step beside them."""
    for place, rows in enumerate(lines):
        done = [row for row in rows if row.status == "done"]
        if not done:
            continue
        left = 0.0
        for key, colour in (("state", "0.45"), ("activations", "C2")):
            width = statistics.median(known([row.figures.get(key) for row in done]) or [0.0]) / MB
            panel.barh(place, width, left=left, color=colour, height=0.6)
            left += width
        steps = known([row.figures.get("step") for row in done])
        if steps:
            panel.text(left, place, " " + duration(statistics.median(steps)), va="center", fontsize=7)
    panel.margins(x=0.25)
    panel.set_xlabel("an update: state (grey) and activations (green), MB; time a step", fontsize=8)
