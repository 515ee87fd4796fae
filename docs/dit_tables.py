"""The table of Frechet distances in docs/images_frechet.md, from what measure_dit.py wrote."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

DIT = Path(__file__).with_name("dit.json")
ITSELF = "the training part itself"


def dit_parts() -> dict[str, str]:
    if not DIT.exists():
        return {"dit-frechet": "Not measured yet: `python docs/measure_dit.py`."}
    found = json.loads(DIT.read_text())
    libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    rows = {name: by_seed for name, by_seed in found["rows"].items() if name != ITSELF}
    features = found["rows"][ITSELF]["0"]["features"]
    told = f"Measured with `python docs/measure_dit.py`, features of {features}; {libraries}."
    return {"dit-frechet": f"{table(rows, found['rows'][ITSELF]['0'])}\n\n{told}"}


def table(rows: dict[str, Any], itself: dict[str, float]) -> str:
    seeds = " / ".join(next(iter(rows.values()), {}))
    lines = [
        f"| form | distance to the training part, seeds {seeds} | to the test part | activations of an update "
        "| seconds of one core, training | sampling |",
        "| --- " * 6 + "|",
    ]
    for name, by_seed in rows.items():
        train, test = (" / ".join(f"{one[part]:.2f}" for one in by_seed.values()) for part in ("train", "test"))
        held = statistics.median(one["activations"] for one in by_seed.values()) / 1e6
        training, sampling = (
            statistics.median(one[f"seconds_{what}"] for one in by_seed.values()) for what in ("training", "sampling")
        )
        lines.append(f"| {name} | {train} | {test} | {held:.1f} MB | {training:.0f} | {sampling:.0f} |")
    lines.append(f"| {ITSELF} | - | {itself['test']:.2f} | - | - | - |")
    return "\n".join(lines)
