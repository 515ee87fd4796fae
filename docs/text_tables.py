"""The tables of docs/text.md, from what measure_text.py and measure_generation.py wrote."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from rows import titled

from dbconvert.engine.shares import entropy_shares

TEXT = Path(__file__).with_name("text.json")
GENERATION = Path(__file__).with_name("generation.json")
LOST = 1e4
"""A perplexity of a character that tells nothing."""
LARGER = Path(__file__).with_name("larger.json")


def text_parts() -> dict[str, str]:
    found = json.loads(TEXT.read_text())
    libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return {
        "text-losses": losses(found["rows"]),
        "text-bounds": bounds(found["rows"]),
        "text-shares": shares(found["rows"]),
        "text-machine": f"Measured with `python docs/measure_text.py` on {found['machine']}; {libraries}.",
        "text-larger": larger(json.loads(LARGER.read_text())),
        "text-generation": generation(json.loads(GENERATION.read_text())),
    }


def losses(rows: dict[str, Any]) -> str:
    seeds = " / ".join(next(iter(rows.values())))
    lines = [
        f"| training | block 0 at sigma_max, from z = 0, seeds {seeds} | the same, from noise | accuracy, all blocks "
        "from z = 0 | activations |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, by_seed in rows.items():
        first = figures(by_seed, "loss_first", "loss")
        drawn = figures(by_seed, "loss_first_draw")
        right = figures(by_seed, "accuracy_zero", "accuracy", percent=True)
        held = statistics.median(one["activations"] for one in by_seed.values()) / 1e6
        lines.append(f"| {titled(name, by_seed, rows)} | {first} | {drawn} | {right} | {held:.1f} MB |")
    return "\n".join(lines)


def with_interval(by_seed: dict[str, Any], name: str) -> str:
    """A metric and half of its interval, seed by seed."""
    found = [(one["metrics"][name], one["metrics"][f"{name}_high"]) for one in by_seed.values()]
    return " / ".join(f"{mean:.3f} ± {high - mean:.3f}" for mean, high in found)


def larger(found: dict[str, Any]) -> str:
    """The table of losses for every file, one seed."""
    parts = []
    for file, rows in found["files"].items():
        parts.append(losses(rows).replace("| training |", f"| {file} |", 1))
    return "\n\n".join(parts)


def figures(by_seed: dict[str, Any], *names: str, percent: bool = False) -> str:
    """The first of some metrics that there is, seed by seed."""
    found = [[one["metrics"][n] for n in names if n in one["metrics"]][:1] for one in by_seed.values()]
    if [] in found:
        return "-"
    numbers: list[float] = [v for first in found for v in first]
    return " / ".join(f"{100 * v:.1f}" for v in numbers) + " %" if percent else " / ".join(f"{v:.3f}" for v in numbers)


def bounds(rows: dict[str, Any]) -> str:
    """What each network's text costs at most, with its interval."""
    measured = {
        name: told
        for name, by_seed in rows.items()
        if (told := {seed: one for seed, one in by_seed.items() if "nats_bound" in one["metrics"]})
    }
    if not measured:
        return "Not measured yet."
    lines = [
        "| training | bound, nats a token | bits a character | perplexity of a token |",
        "| --- | --- | --- | --- |",
    ]
    for name, by_seed in measured.items():
        cells = (with_interval(by_seed, figure) for figure in ("nats_bound", "bits_per_character"))
        finite = all(one["metrics"].get("perplexity_bound", LOST) < LOST for one in by_seed.values())
        perplexity = figures(by_seed, "perplexity_bound") if finite else "-"
        lines.append(f"| {titled(name, by_seed, measured)} | {' | '.join(cells)} | {perplexity} |")
    return "\n".join(lines)


def shares(rows: dict[str, Any]) -> str:
    """How much of what is open at sigma_max each block resolves, by the trained network's own curve."""
    lines = ["| training | block 0 | block 1 | block 2 |", "| --- | --- | --- | --- |"]
    for name, by_seed in rows.items():
        told = [share(one) for one in by_seed.values() if "loss_first_draw" in one["metrics"]]
        if told:
            cells = (" / ".join(f"{of_block:.2f}" for of_block in blocks) for blocks in zip(*told, strict=True))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share(one: dict[str, Any]) -> list[float]:
    """What `eval` said; of runs that it was not asked about, from their losses at fixed levels."""
    metrics = one["metrics"]
    told = [value for name, value in metrics.items() if name.startswith("entropy_share_block_")]
    if told:
        return told
    curve = sorted(
        (float(name.removeprefix("loss_sigma_")), value)
        for name, value in metrics.items()
        if name.startswith("loss_sigma_")
    )
    inner = [between(curve, sigma) for sigma in one["boundaries"][1:-1]]
    return list(entropy_shares([curve[0][1], *inner, metrics["loss_first_draw"]]).values())


def between(curve: list[tuple[float, float]], sigma: float) -> float:
    """The cross-entropy at a level, linear between the measured ones."""
    for (low, below), (high, above) in pairwise(curve):
        if low <= sigma <= high:
            return below + (above - below) * (sigma - low) / (high - low)
    return curve[-1][1]


def generation(found: dict[str, Any]) -> str:
    lines = [
        "| width | tokens a second, unconverted | in blocks | ratio | ratio of the weights read |",
        "| --- | --- | --- | --- | --- |",
    ]
    for width, row in found["widths"].items():
        own, ours = (statistics.median(values) for values in row["tokens_per_second"].values())
        lines.append(f"| {width} | {own:.1f} | {ours:.1f} | {row['ratio']:.2f} | {row['weights']:.2f} |")
    lines.append(
        f"\nLlamas of {found['layers']} layers and {found['vocabulary']:,} tokens in {found['blocks']} blocks, greedy, "
        f"one example, both cached, in turns, medians (`python docs/measure_generation.py`, {found['machine']})."
    )
    return "\n".join(lines)
