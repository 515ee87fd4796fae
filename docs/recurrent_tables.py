"""The tables of recurrent depth in docs/text.md, from what measure_recurrent.py wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECURRENT = Path(__file__).with_name("recurrent.json")
COMMAND = "`python docs/measure_recurrent.py`"
NAMES = {
    "recurrent": "one round",
    "truncated": "truncated, a quarter of the rounds",
    "full": "all rounds",
    "shallow": "shallow control, one round without noise",
}


def recurrent_parts() -> dict[str, str]:
    if not RECURRENT.exists():
        parts = ("recurrent-cost", "recurrent-quality", "recurrent-steps", "recurrent-machine")
        return dict.fromkeys(parts, f"Not measured yet ({COMMAND}).")
    found = json.loads(RECURRENT.read_text())
    libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    settings = found["settings"]
    return {
        "recurrent-cost": cost(found["rounds"]),
        "recurrent-quality": quality(found["rounds"]),
        "recurrent-steps": steps_table(found["rounds"]),
        "recurrent-machine": f"Measured with {COMMAND} on {found['machine']}, {found['threads']} threads: medians of "
        f"{settings['repeats']} updates in turns, {settings['seconds']:g} seconds of training each; {libraries}.",
    }


def cost(rounds: dict[str, Any]) -> str:
    lines = [
        "| rounds | update of | layers forward / backward | activations | ms | times one round's, by the clock "
        "| by layers | share of it |",
        "| --- " * 8 + "|",
    ]
    for count, found in rounds.items():
        one = found["cost"]["recurrent"]
        for name, row in found["cost"].items():
            clock, layers = row["seconds"] / one["seconds"], work(row) / work(one)
            lines.append(
                f"| {count} | {NAMES[name]} | {row['forward']} / {row['backward']} | {row['activations'] / 1e6:.1f} MB "
                f"| {1000 * row['seconds']:.0f} | {clock:.2f} | {layers:.2f} | {clock / layers:.2f} |"
            )
    return "\n".join(lines)


def work(row: dict[str, Any]) -> float:
    """Layers run, a backward pass counted as two forward ones."""
    return float(row["forward"] + 2 * row["backward"])


def quality(rounds: dict[str, Any]) -> str:
    seeds = next((" / ".join(by) for found in rounds.values() for by in found["quality"].values()), "")
    lines = [
        f"| rounds | training | updates | loss, seeds {seeds} | from noise | accuracy | the same after all rounds |",
        "| --- " * 7 + "|",
    ]
    for count, found in rounds.items():
        for name, by_seed in found["quality"].items():
            steps = next(iter(by_seed.values()))["steps"]
            loss = figures(by_seed, "loss_first", "loss")
            right = "-" if name == "recurrent" else figures(by_seed, "accuracy", percent=True)
            after = figures(by_seed, "accuracy_zero", percent=True)
            drawn = figures(by_seed, "loss_first_draw")
            lines.append(f"| {count} | {NAMES[name]} | {steps} | {loss} | {drawn} | {right} | {after} |")
    return "\n".join(lines)


def steps_table(rounds: dict[str, Any]) -> str:
    """The loss of the trained one-round networks after some evaluations of the core."""
    counts = ("first", "4", "8", "16")
    lines = [
        "| rounds in the network | from | at sigma_max | after 4 evaluations | after 8 | after 16 |",
        "| --- " * 6 + "|",
    ]
    for count, found in rounds.items():
        by_seed = found["quality"].get("recurrent", {})
        names = {"z = 0": ("loss_first", "loss_zero_after_"), "noise": ("loss_first_draw", "loss_draw_after_")}
        for begin, (first, after) in names.items():
            told = (figures(by_seed, first if n == "first" else after + n) for n in counts)
            lines.append(f"| {count} | {begin} | {' | '.join(told)} |")
    return "\n".join(lines)


def figures(by_seed: dict[str, Any], *names: str, percent: bool = False) -> str:
    """The first of some figures that there is, of every seed."""
    found = []
    for one in by_seed.values():
        value = next((one["metrics"][name] for name in names if name in one["metrics"]), None)
        if value is not None:
            found.append(f"{100 * value:.1f}" if percent else f"{value:.3f}")
    return (" / ".join(found) + (" %" if percent else "")) if found else "-"
