"""What an update costs beside its passes, and what the updates of all blocks cost beside one end-to-end.

    python docs/measure_step.py step.json [--repeats 40] [--only vit_digits]

Medians of repeats that take turns in one process. `update` is all that the loop does for a batch that is there;
`passes` its forward and backward pass. `overhead` is the share of the loop's time, loading included, that is neither
passes nor clipping nor the optimisers' steps, at batch 32 on the digits ViT.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dbconvert.engine.loop import Loop
from dbconvert.engine.prepare import prepare, read_origin
from dbconvert.engine.train import make_accelerator
from dbconvert.events import silent

RECIPES = ("vit_digits", "dit_digits")
QUIET = ["data.validation=null", "train.checkpoint_every=0", "log.every=10"]


class Timed:
    """A loop whose passes, clipping and optimiser steps are timed; on CUDA each waits for the device."""

    def __init__(self, recipe: str, folder: Path, overrides: list[str]) -> None:
        folder.mkdir(parents=True)
        origin = read_origin(recipe, [*QUIET, *overrides])
        job = prepare(origin, folder, None, silent, keep_noise=False).job
        self.loop = Loop(job, make_accelerator(origin.recipe, folder), silent)
        self.parts = dict.fromkeys(("passes", "clip", "step"), 0.0)
        job.method.learn = self.timed("passes", job.method.learn)  # type: ignore[method-assign]
        self.loop.clip = self.timed("clip", self.loop.clip)  # type: ignore[method-assign]
        for unit in job.all_units():
            unit.optimizer.step = self.timed("step", unit.optimizer.step)  # type: ignore[method-assign]
        now = time.perf_counter()
        self.loop.started, self.loop.counted, self.loop.begun = now, 0, now
        self.batches = self.loop.loaded()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = self.now()
            found = call(*args, **kwargs)
            self.parts[part] += self.now() - begun
            return found

        return run

    def now(self) -> float:
        if self.loop.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def updates(self, blocks: list[int]) -> tuple[float, float, float]:
        """Seconds of one update of each of these blocks: all, passes, and all that is timed."""
        self.parts = dict.fromkeys(self.parts, 0.0)
        total = 0.0
        for block in blocks:
            batch = next(self.batches)
            begun = self.now()
            self.loop.update(block, batch)
            total += self.now() - begun
            self.loop.updates += 1
        return total, self.parts["passes"], sum(self.parts.values())

    def whole(self) -> tuple[float, float]:
        """Seconds of a turn of the loop itself, loading included, and those of passes, clipping and steps."""
        self.parts = dict.fromkeys(self.parts, 0.0)
        begun = self.now()
        batch = next(self.batches)
        self.loop.update(self.loop.order[self.loop.updates], batch)
        self.loop.updates += 1
        return self.now() - begun, sum(self.parts.values())


def steps(recipe: str, repeats: int, folder: Path) -> dict[str, Any]:
    """The updates of all blocks beside one end-to-end."""
    long = ["train.steps=100000", "train.epochs=null"]
    made = {
        "end-to-end": Timed(recipe, folder / "end", ["train.method=end-to-end", *long]),
        "blocks": Timed(recipe, folder / "blocks", long),
        "blocks, modulation recomputed": Timed(recipe, folder / "again", ["train.recompute_modulation=true", *long]),
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in made}
    for repeat in range(repeats + 3):
        for name, timed in made.items():
            seconds = timed.updates(sorted(timed.loop.job.units))
            if repeat >= 3:
                found[name].append(seconds)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    update, passes, _ = medians["end-to-end"]
    return {
        name: {
            "update": row[0],
            "passes": row[1],
            "update ratio": row[0] / update,
            "passes ratio": row[1] / passes,
            "blocks": len(made[name].loop.job.units),
        }
        for name, row in medians.items()
    }


def overhead(repeats: int, folder: Path) -> dict[str, float]:
    timed = Timed("vit_digits", folder / "overhead", ["train.batch=32", "train.steps=100000", "train.epochs=null"])
    turns = [timed.whole() for _ in range(3 * repeats + 9)][9:]
    total, own = (statistics.median(column) for column in zip(*turns, strict=True))
    return {"seconds": total, "overhead": statistics.median(1 - part / whole for whole, part in turns), "timed": own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--only", choices=RECIPES)
    asked = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    found: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "device": device}
    with tempfile.TemporaryDirectory() as folder:
        found["overhead"] = overhead(asked.repeats, Path(folder))
        for recipe in [asked.only] if asked.only else RECIPES:
            found[recipe] = steps(recipe, asked.repeats, Path(folder) / recipe)
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
