"""The table of blocks that hear each other in docs/text.md, from what measure_context.py wrote."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rows import titled
from text_tables import TEXT, figures

CONTEXT = Path(__file__).with_name("context.json")
CONTROLS = ("end-to-end", "shallow control, 2 layers")


def context_parts() -> dict[str, str]:
    if not CONTEXT.exists():
        return {"text-context": "Not measured yet: `python docs/measure_context.py`."}
    found = json.loads(CONTEXT.read_text())
    libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    told = f"Measured with `python docs/measure_context.py`; {libraries}."
    return {"text-context": f"{table(found['rows'])}\n\n{told}"}


def table(rows: dict[str, Any]) -> str:
    seeds = " / ".join(next(iter(rows.values())))
    lines = [
        f"| context, z | all blocks from z = 0, nats, seeds {seeds} | accuracy | accuracy from one draw of "
        "noise | bound, nats | block 0 alone | its accuracy | layers an update, forward only | activations "
        "| seconds of one core |",
        "| --- " * 10 + "|",
    ]
    for name, by_seed in rows.items():
        loss, right = figures(by_seed, "loss_zero"), figures(by_seed, "accuracy_zero", percent=True)
        drawn, bound = figures(by_seed, "accuracy_draw", percent=True), figures(by_seed, "nats_bound")
        first = figures(by_seed, "loss_first")
        early = " / ".join(f"{100 * one['evaluations'][0]['accuracy']:.1f}" for one in by_seed.values()) + " %"
        before = statistics.mean(one["layers"]["forward only"] for one in by_seed.values())
        held = statistics.median(one["activations"] for one in by_seed.values()) / 1e6
        time = statistics.median(one["seconds"] for one in by_seed.values())
        cells = [loss, right, drawn, bound, first, early, f"{before:.2f}", f"{held:.1f} MB", f"{time:.0f}"]
        lines.append(f"| {titled(name, by_seed, rows)} | {' | '.join(cells)} |")
    controls = json.loads(TEXT.read_text())["rows"]
    for name in CONTROLS:
        by_seed = controls[name]
        loss, right = figures(by_seed, "loss"), figures(by_seed, "accuracy", percent=True)
        lines.append(f"| {name} | {loss} | {right} | - | {loss} | - | - | 0 | - | - |")
    return "\n".join(lines)
