"""The tables of docs/context.md, from what `dbconvert compare RECIPE --against depth` wrote."""

from __future__ import annotations

import json
from pathlib import Path

from memory_tables import DATA, read_comparison, table

from dbconvert.amounts import size
from dbconvert.engine.comparison import NONE, Row, median, spread

DEPTH = Path(__file__).with_name("depth")
TABLES = {
    "s3": "s3",
    "s3-6": "s3 split.blocks=6",
    "s3-single": "s3 data.puzzle.single=true data.puzzle.size=6",
    "permutation_powers": "permutation_powers",
    "permutation_powers-6": "permutation_powers split.blocks=6",
    "permutation_powers-single": "permutation_powers source=examples/permutation_powers.py:highest_power "
    "data.puzzle.single=true",
    "permutation_powers-single-6": "permutation_powers source=examples/permutation_powers.py:highest_power "
    "data.puzzle.single=true split.blocks=6",
    "automaton": "automaton",
    "automaton-6": "automaton split.blocks=6",
    "automaton-single": "automaton data.puzzle.single=true",
    "automaton-mixed": "automaton source=examples/automaton.py:mixed_steps data.puzzle.steps=[1,6]",
    "vit_digits": "vit_digits",
    "mdm_text_tiny": "mdm_text_tiny",
    "ar_text_tiny-shakespeare": "ar_text_tiny data.source=tinyshakespeare.txt",
    "mdm_text_tiny-shakespeare": "mdm_text_tiny data.source=tinyshakespeare.txt",
    "dit_digits": "dit_digits",
}
"""What is compared, by the folder of its table."""
WHOLE = "end-to-end"


BY_DEPTH = DEPTH / "depth.json"
"""As measure_depth.py wrote it."""


def depth_parts() -> dict[str, str]:
    return {**{f"depth-{name}": told(name) for name in TABLES}, "by-depth": by_depth()}


def by_depth() -> str:
    """Accuracy by how many steps an answer takes."""
    if not BY_DEPTH.exists():
        return "Not measured yet: `python docs/measure_depth.py`."
    tables = []
    for puzzle, runs in json.loads(BY_DEPTH.read_text(encoding="utf-8")).items():
        depths = next(iter(runs.values()))["by_depth"]
        lines = [[f"{puzzle}, steps", *depths]]
        lines += [[name, *(f"{value:.0f}" for value in run["by_depth"].values())] for name, run in runs.items()]
        tables.append(table(lines))
    return "\n\n".join([*tables, "![the same as curves](depth/depth.png)"])


def told(name: str) -> str:
    path = DEPTH / name / DATA
    if not path.exists():
        return f"Not measured yet: `dbconvert compare {TABLES[name]} --against depth`."
    comparison = read_comparison(path)
    by_name = {key: [row for row in own if row.status == "done"] for key, own in comparison.by_name().items()}
    whole = by_name.get(WHOLE, [])
    titles = [quality.title for quality in comparison.qualities]
    lines = [["training", *titles, "activations", "of end-to-end's", "layer evaluations, of end-to-end's"]]
    for key, own in by_name.items():
        qualities = [spread([row.quality.get(one.title) for row in own], one) for one in comparison.qualities]
        kept, work = (middle(own, figure) for figure in ("activations", "work"))
        kept_whole, work_whole = (middle(whole, figure) for figure in ("activations", "work"))
        lines.append(
            [key, *qualities, NONE if kept is None else size(kept), *map(share, (kept, work), (kept_whole, work_whole))]
        )
    notes = "\n".join(f"- {note}" for note in comparison.notes())
    return f"{table(lines)}\n\n{notes}"


def middle(rows: list[Row], figure: str) -> float | None:
    """The median of a figure; `work` is layer evaluations, forward ones counted as a third."""
    if figure != "work":
        return median([row.figures.get(figure) for row in rows])
    both = [(row.figures.get("passes"), row.figures.get("updates")) for row in rows]
    return median([passes * updates for passes, updates in both if passes is not None and updates is not None])


def share(value: float | None, whole: float | None) -> str:
    return f"{value / whole:.2f}" if value is not None and whole else NONE
