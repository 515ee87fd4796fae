"""The table of masked text in docs/text.md, from what measure_masked.py wrote."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

MASKED = Path(__file__).with_name("masked.json")


def masked_parts() -> dict[str, str]:
    found = json.loads(MASKED.read_text())
    libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return {
        "masked-bits": bits(found["rows"]),
        "masked-machine": f"Measured with `python docs/measure_masked.py`; {libraries}.",
    }


def bits(rows: dict[str, Any]) -> str:
    seeds = " / ".join(next(iter(rows.values())))
    lines = [
        f"| training | bits a character, with their 95 % interval, seeds {seeds} | activations | seconds of one core |",
        "| --- | --- | --- | --- |",
    ]
    for name, by_seed in rows.items():
        told = " / ".join(interval(one["metrics"]) for one in by_seed.values())
        held = statistics.median(one["activations"] for one in by_seed.values()) / 1e6
        time = statistics.median(one["seconds"] for one in by_seed.values())
        lines.append(f"| {name} | {told} | {held:.1f} MB | {time:.0f} |")
    return "\n".join(lines)


def interval(metrics: dict[str, float]) -> str:
    mean, high = metrics["bits_per_character"], metrics["bits_per_character_high"]
    return f"{mean:.3f} ± {high - mean:.3f}"
