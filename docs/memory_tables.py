"""The tables of docs/memory.md, from what `dbconvert compare RECIPE --against peers` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dbconvert.amounts import size
from dbconvert.engine.comparison import Comparison, Quality, Row, median, spread
from dbconvert.schema import parse

PEERS = Path(__file__).with_name("peers")
RECIPES = ("vit_digits", "ar_text_tiny", "dit_digits")
DATA, PICTURE = "table.json", "table.png"


def memory_parts() -> dict[str, str]:
    return {f"peers-{name}": told(name) for name in RECIPES}


def told(name: str) -> str:
    path = PEERS / name / DATA
    if not path.exists():
        return f"Not measured yet: `dbconvert compare {name} --against peers`, see above."
    comparison = read_comparison(path)
    headers, lines = comparison.table()
    tables = []
    for titles in comparison.groups().values():
        chosen = [0, *(headers.index(title) for title in titles)]
        tables.append(table([[headers[i] for i in chosen], *([line[i] for i in chosen] for line in lines)]))
    notes = "\n".join(f"- {note}" for note in [*verdicts(comparison), *comparison.notes()])
    return "\n\n".join([*tables, f"![memory, quality and time of each row](peers/{name}/{PICTURE})", notes])


def read_comparison(path: Path) -> Comparison:
    """What `dbconvert compare` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = tuple(parse(Row, row, file=str(path)) for row in found["rows"])
    overrides = tuple(found.get("overrides", ()))
    return Comparison(found["target"], path.parent, found["varied"], rows, found["left"], overrides)


def table(lines: list[list[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(word.replace("|", "\\|") for word in line) + " |" for line in rows)


def verdicts(comparison: Comparison) -> list[str]:
    """Which row is best at what."""
    by_name = {name: [row for row in rows if row.status == "done"] for name, rows in comparison.by_name().items()}
    peaks = {name: median([row.figures.get("peak") for row in rows]) for name, rows in by_name.items()}
    known = sorted((peak, name) for name, peak in peaks.items() if peak is not None)
    whole = peaks.get("end-to-end")
    found = []
    if known and whole:
        least, name = known[0]
        found.append(f"least memory: {name}, {size(least)}, {100 * least / whole:.0f} % of end-to-end training's")
    times = comparison.equal_time
    for quality in comparison.qualities:
        done = {name: [row.quality for row in rows] for name, rows in by_name.items()}
        then = {name: [row.at(times.get(row.cell.seed, 0.0)) for row in rows] for name, rows in by_name.items()}
        for when, told in (("once trained", done), ("at equal time", then)):
            best = best_of(quality, told)
            found += [f"best {quality.title} {when}: {best}"] if best else []
    return found


def best_of(quality: Quality, told: Mapping[str, list[dict[str, float | None]]]) -> str | None:
    """The row with the best median: shares are to be high, losses and distances low."""
    found = []
    for name, seeds in told.items():
        values = [one.get(quality.title) for one in seeds]
        middle = median(values)
        if middle is not None:
            found.append((-middle if quality.share else middle, f"{name}, {spread(values, quality)}"))
    return min(found)[1] if found else None
