"""What an update costs beside its passes, what those of all blocks cost beside one end-to-end, and what moving costs.

    OMP_NUM_THREADS=1 python docs/measure_step.py docs/step.json [--repeats 40] [--only vit_digits] [--mosaics FOLDER]
    python docs/regenerate.py

`--mosaics` adds the steps of vit_cifar100, the paper's network, on mosaics of CIFAR-100 that are not augmented.
Medians of repeats that take turns in one process. `update` is all that the loop does for a batch that is there;
`passes` its forward and backward pass. `overhead` is the share of the loop's time, loading included, that is neither
passes nor clipping nor the optimisers' steps, at batch 32 on the digits ViT. `moves` is a turn of TURN updates of one
block, loading included, with inactive blocks in host memory or on disk: the time of the move, and the whole turn beside
one with all blocks resident. Each is a process of its own, since blocks on disk change how a process allocates memory;
their turns take turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dbconvert.engine.loop import Loop
from dbconvert.engine.prepare import prepare, read_origin
from dbconvert.engine.stores import open_store
from dbconvert.engine.train import make_accelerator
from dbconvert.events import silent

RECIPES = ("vit_digits", "dit_digits")
LARGER = "vit_cifar100"
QUIET = ["data.validation=null", "train.checkpoint_every=0", "log.every=10"]
LONG = ["train.steps=100000", "train.epochs=null"]
INACTIVE = ("resident", "host", "disk")
TURN = 20


class Timed:
    """A loop whose passes, clipping and optimiser steps are timed; on CUDA each waits for the device."""

    def __init__(self, recipe: str, folder: Path, overrides: list[str]) -> None:
        folder.mkdir(parents=True)
        origin = read_origin(recipe, [*QUIET, *LONG, *overrides])
        accelerator = make_accelerator(origin.recipe, folder)
        store = open_store(origin.recipe.train.inactive, folder, accelerator.device)
        job = prepare(origin, folder, None, silent, store=store, keep_noise=False).job
        self.loop = Loop(job, accelerator, silent)
        self.parts = dict.fromkeys(("passes", "clip", "step", "move"), 0.0)
        job.method.learn = self.timed("passes", job.method.learn)  # type: ignore[method-assign]
        self.loop.clip = self.timed("clip", self.loop.clip)  # type: ignore[method-assign]
        self.loop.bring = self.timed("move", self.loop.bring)  # type: ignore[method-assign]
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
        return total, self.parts["passes"], self.own()

    def own(self) -> float:
        """Seconds of passes, clipping and steps."""
        return sum(self.parts[part] for part in ("passes", "clip", "step"))

    def whole(self) -> tuple[float, float]:
        """Seconds of a turn of the loop itself, loading included, and those of passes, clipping and steps."""
        self.parts = dict.fromkeys(self.parts, 0.0)
        begun = self.now()
        batch = next(self.batches)
        self.loop.update(self.loop.order[self.loop.updates], batch)
        self.loop.updates += 1
        return self.now() - begun, self.own()

    def turn(self) -> tuple[float, float]:
        """Seconds of TURN turns of the loop, and those of bringing a block."""
        moved, total = 0.0, 0.0
        for _ in range(TURN):
            total += self.whole()[0]
            moved += self.parts["move"]
        return total, moved


def steps(recipe: str, repeats: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The updates of all blocks beside one end-to-end."""
    made = {
        "end-to-end": Timed(recipe, folder / "end", [*overrides, "train.method=end-to-end"]),
        "blocks": Timed(recipe, folder / "blocks", overrides),
        "blocks, modulation recomputed": Timed(
            recipe, folder / "again", [*overrides, "train.recompute_modulation=true"]
        ),
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
    timed = Timed("vit_digits", folder / "overhead", ["train.batch=32"])
    turns = [timed.whole() for _ in range(3 * repeats + 9)][9:]
    total, own = (statistics.median(column) for column in zip(*turns, strict=True))
    return {"seconds": total, "overhead": statistics.median(1 - part / whole for whole, part in turns), "timed": own}


def moves(recipe: str, turns: int, folder: Path) -> dict[str, Any]:
    """Turns with inactive blocks away beside turns with all of them there."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for where in INACTIVE:
        pipes[where], theirs = context.Pipe()
        given = recipe, where, folder / where, torch.get_num_threads(), theirs
        workers.append(context.Process(target=take_turns, args=given))
        workers[-1].start()
    found: dict[str, list[tuple[float, float]]] = {where: [] for where in INACTIVE}
    blocks = pipes["resident"].recv()
    for turn in range(2 * blocks + turns):  # every block makes its optimiser's state first, and then its room
        for where, pipe in pipes.items():
            pipe.send(True)
            seconds = pipe.recv()
            if turn >= 2 * blocks:
                found[where].append(seconds)
    for pipe, worker in zip(pipes.values(), workers, strict=True):
        pipe.send(False)
        worker.join()
    there = [total for total, _ in found["resident"]]
    return {
        where: {
            "turn": statistics.median(total for total, _ in rows),
            "move": statistics.median(moved for _, moved in rows),
            "move share": statistics.median(moved / (total - moved) for total, moved in rows),
            "turn ratio": statistics.median(total / beside for (total, _), beside in zip(rows, there, strict=True)),
        }
        for where, rows in found.items()
    }


def take_turns(recipe: str, where: str, folder: Path, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    rotating = ["train.order=rotate", f"train.steps_per_turn={TURN}", f"train.inactive={where}"]
    timed = Timed(recipe, folder, rotating)
    if where == INACTIVE[0]:
        pipe.send(len(timed.loop.job.units))
    while pipe.recv():
        pipe.send(timed.turn())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--only", choices=RECIPES)
    parser.add_argument("--mosaics", type=Path)
    asked = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    found: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "device": device}
    found["load"] = [round(os.getloadavg()[0], 1)]
    with tempfile.TemporaryDirectory() as folder:
        found["overhead"] = overhead(asked.repeats, Path(folder))
        for recipe in [asked.only] if asked.only else RECIPES:
            found[recipe] = steps(recipe, asked.repeats, Path(folder) / recipe, [])
            found[recipe]["moves"] = moves(recipe, asked.repeats, Path(folder) / recipe / "moves")
        if asked.mosaics is not None:
            plain = [
                f"data.source={asked.mosaics.resolve()}",
                "data.tile=32",
                "data.flip=false",
                "data.randaugment=null",
            ]
            found[LARGER] = steps(LARGER, max(3, asked.repeats // 5), Path(folder) / LARGER, plain)
    found["load"].append(round(os.getloadavg()[0], 1))
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
