"""The tables of image diffusion in docs/images.md, from what measure_dit.py and measure_sampling.py wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import titled

DIT, SAMPLING, FORMS = (
    Path(__file__).parent / name for name in ("dit.json", "sampling.json", "depth/dit_digits/frechet.json")
)
ITSELF = "the training part itself"
GRIDS = ("karras", "quantiles")
PARTS = {"train": "the training part", "test": "the test part", "all": "all digits"}


def dit_parts() -> dict[str, str]:
    return {
        "dit-frechet": part(DIT, distances, "measure_dit.py"),
        "dit-sampling": part(SAMPLING, steps, "measure_sampling.py"),
        "dit-forms": part(FORMS, forms, "measure_dit.py --cells CELLS"),
    }


def part(path: Path, told: Callable[[dict[str, Any]], str], script: str) -> str:
    return told(json.loads(path.read_text())) if path.exists() else f"Not measured yet: `python docs/{script}`."


def distances(found: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    rows = {name: by_seed for name, by_seed in found["rows"].items() if name != ITSELF}
    features = found["rows"][ITSELF]["0"]["features"]
    told = f"Measured with `python docs/measure_dit.py`, features of {features}; {libraries}."
    return f"{table(rows, found['rows'][ITSELF]['0'])}\n\n{told}"


def steps(found: dict[str, Any]) -> str:
    seconds = ", ".join(f"{name} {1000 * taken:.1f} ms" for name, taken in found["seconds"].items())
    return (
        f"A DiT of {found['layers']} layers, {found['width']} wide, in {found['blocks']} blocks, {found['batch']} "
        f"images of 32 x 32, in turns, medians: {seconds}; a step in blocks is {found['times_faster']:.2f} times as "
        f"fast (`python docs/measure_sampling.py`, {found['machine']})."
    )


def forms(found: dict[str, Any]) -> str:
    """Of what blocks hear of each other; sampled at the levels of the default grid."""
    lines = [
        f"| training | {' | '.join(f'distance to {part}' for part in PARTS.values())} |",
        "| --- | --- | --- | --- |",
    ]
    for name, by_seed in found["rows"].items():
        told = [" / ".join(f"{one[GRIDS[0]][part]:.2f}" for one in by_seed.values()) for part in PARTS]
        lines.append(f"| {titled(name, by_seed, found['rows'])} | {' | '.join(told)} |")
    return "\n".join(lines)


def table(rows: dict[str, Any], itself: dict[str, float]) -> str:
    seeds = " / ".join(next(iter(rows.values()), {}))
    columns = [(part, grid) for grid in GRIDS for part in PARTS]
    named = [f"`{grid}`: {PARTS[part]}" for part, grid in columns]
    lines = [
        f"| form, seeds {seeds} | {' | '.join(named)} | activations of an update | seconds of one core, training "
        "| sampling |",
        "| --- " * (len(columns) + 4) + "|",
    ]
    for name, by_seed in rows.items():
        told = [" / ".join(f"{one[grid][part]:.2f}" for one in by_seed.values()) for part, grid in columns]
        held = statistics.median(one["activations"] for one in by_seed.values()) / 1e6
        training, sampling = (
            statistics.median(one[f"seconds_{what}"] for one in by_seed.values()) for what in ("training", "sampling")
        )
        lines.append(f"| {name} | {' | '.join(told)} | {held:.1f} MB | {training:.0f} | {sampling:.0f} |")
    own = [f"{itself[part]:.2f}" if part in itself else "-" for part, _ in columns]
    lines.append(f"| {ITSELF} | {' | '.join(own)} | - | - | - |")
    return "\n".join(lines)
