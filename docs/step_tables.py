"""The tables of what a step costs, from what docs/measure_step.py measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STEP = Path(__file__).with_name("step.json")
RECIPES = ("vit_digits", "dit_digits", "vit_cifar100")
PARTS = ("step-blocks", "step-moves", "step-loop")
MILLI = 1e3


def step_parts() -> dict[str, str]:
    if not STEP.exists():
        return dict.fromkeys(PARTS, "Not measured yet: `OMP_NUM_THREADS=1 python docs/measure_step.py docs/step.json`.")
    found = json.loads(STEP.read_text(encoding="utf-8"))
    told = {name: found[name] for name in RECIPES if name in found}
    return dict(zip(PARTS, (block_table(told), move_table(told), loop(found)), strict=True))


def block_table(found: dict[str, Any]) -> str:
    lines = ["| recipe | updates of all blocks, beside one end-to-end | their passes alone |", "| --- " * 3 + "|"]
    for name, rows in found.items():
        for kind, row in rows.items():
            if kind.startswith("blocks"):
                lines.append(
                    f"| {name}, {row['blocks']} {kind} | {row['update ratio']:.3f} | {row['passes ratio']:.3f} |"
                )
    return "\n".join(lines)


def move_table(found: dict[str, Any]) -> str:
    lines = ["| recipe | inactive blocks | a move | of the turn | turn, beside resident |", "| --- " * 5 + "|"]
    for name, rows in found.items():
        for where, row in rows.get("moves", {}).items():
            if where != "resident":
                cells = f"{MILLI * row['move']:.2f} ms | {100 * row['move share']:.2f} % | {row['turn ratio']:.3f}"
                lines.append(f"| {name} | {where} | {cells} |")
    return "\n".join(lines)


def loop(found: dict[str, Any]) -> str:
    """The loop's own share, and how all of it was measured."""
    own, load = found["overhead"]["overhead"], " to ".join(f"{value:.1f}" for value in found["load"])
    where = f"{found['device']}, {found['machine']}, torch {found['torch']}"
    return (
        f"At batch 32 on `vit_digits` the loop's own part of an update, loading included, is {100 * own:.1f} %.\n\n"
        f"Measured with `python docs/measure_step.py docs/step.json` on {where}; load of the machine {load}."
    )
