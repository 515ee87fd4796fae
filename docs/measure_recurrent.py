"""Measures what docs/text.md says of recurrent depth, and writes it to docs/recurrent.json; regenerate.py makes tables.

    python docs/measure_recurrent.py                  # what recurrent.json lacks; about 20 minutes on a quiet machine
    python docs/measure_recurrent.py --fresh          # everything again
    python docs/measure_recurrent.py --seconds 2 --repeats 3 --seeds 0 --out some.json    # only whether it runs

For cores of 4, 8 and 16 rounds of recipes/huginn_text_tiny.yaml: what an update costs as one round on a noisy state, by
truncated and by full backpropagation through the rounds, and in the shallow control of one round, timed in turns; then
every form is trained for as many updates as fit into the same seconds, and evaluated on text that was not trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dbconvert
from dbconvert.engine.loop import Loop
from dbconvert.engine.memory import measure
from dbconvert.engine.prepare import prepare, read_origin
from dbconvert.engine.train import make_accelerator
from dbconvert.events import silent

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "huginn_text_tiny.yaml"
EXAMPLE = ROOT / "examples" / "huginn.py"
ITERATIONS = "iterations=8)"
ROUNDS = (4, 8, 16)
PARTS = ("prelude", "core", "coda")
QUIET = ["data.validation=null", "log.every=1000000", "train.checkpoint_every=0"]
WARM = 3
"""Updates of each form that are not timed."""


def forms(rounds: int) -> dict[str, list[str]]:
    """The overrides of every form; truncated backpropagation goes back the paper's share, 8 of 32 rounds."""
    return {
        "recurrent": [],
        "truncated": ["train.method=truncated-bptt", f"train.backpropagate={rounds // 4}"],
        "full": ["train.method=end-to-end"],
        "shallow": ["train.method=shallow"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for every form")
    parser.add_argument("--repeats", type=int, default=40, help="timed updates of every form")
    parser.add_argument("--seeds", nargs="+", default=["0", "1"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "recurrent.json")
    asked = parser.parse_args()
    settings = {"seconds": asked.seconds, "repeats": asked.repeats}
    results = begun(asked.out, settings, fresh=asked.fresh)
    with tempfile.TemporaryDirectory() as folder:
        for rounds in ROUNDS:
            source = Path(folder) / f"huginn_{rounds}.py"
            source.write_text(EXAMPLE.read_text().replace(ITERATIONS, f"iterations={rounds})"))
            found = results["rounds"].setdefault(str(rounds), {"quality": {}})
            if "cost" not in found:
                say(f"{rounds} rounds, cost of an update")
                found["cost"] = costs(source, rounds, asked.repeats, Path(folder))
                keep(asked.out, results)
            for seed in asked.seeds:
                for name, overrides in forms(rounds).items():
                    if seed not in found["quality"].setdefault(name, {}):
                        say(f"{rounds} rounds, {name}, seed {seed}")
                        steps = max(1, round(asked.seconds / found["cost"][name]["seconds"]))
                        found["quality"][name][seed] = trained(source, overrides, steps, seed, Path(folder))
                        keep(asked.out, results)
    return 0


def begun(path: Path, settings: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
    if path.exists() and not fresh:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["settings"] != settings:
            sys.exit(
                f"{path} was measured with other settings ({found['settings']}): add --fresh, or give another --out"
            )
        return found
    return {
        "versions": {name: version(name) for name in ("dbconvert", "torch")},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "threads": torch.get_num_threads(),
        "settings": settings,
        "rounds": {},
    }


def keep(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


# -- the cost of an update ------------------------------------------------------------------------------------------


def costs(source: Path, rounds: int, repeats: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Of every form: layers run forward and backward, activations, and the median seconds of an update, in turns."""
    loops = {
        name: loop(source, overrides, folder / f"cost-{rounds}-{name}") for name, overrides in forms(rounds).items()
    }
    found = {name: {**layers_run(one), "activations": held(one)} for name, one in loops.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    batches = {name: one.loaded() for name, one in loops.items()}
    for turn in range(WARM + repeats):
        for name, one in loops.items():
            batch = next(batches[name])
            synchronize()
            begin = time.perf_counter()
            one.update(0, batch)
            synchronize()
            if turn >= WARM:
                times[name].append(time.perf_counter() - begin)
    return {name: {**found[name], "seconds": statistics.median(times[name])} for name in loops}


def loop(source: Path, overrides: list[str], folder: Path) -> Loop:
    origin = read_origin(str(RECIPE), [f"source={source}", *QUIET, *overrides])
    prepared = prepare(origin, folder, None, silent)
    made = Loop(prepared.job, make_accelerator(origin.recipe, folder), silent)
    made.started, made.counted = time.perf_counter(), 0
    made.timed()
    return made


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def held(one: Loop) -> int:
    return measure(one.job, one.accelerator.device).largest.activations


def layers_run(one: Loop) -> dict[str, int]:
    """Calls of layers in one update, and those of them that there is a backward pass through."""
    counts = {"forward": 0, "backward": 0}

    def count(*_: object) -> None:
        counts["forward"] += 1
        counts["backward"] += torch.is_grad_enabled()

    model = one.job.network.model
    layers: list[nn.Module] = [layer for part in PARTS for layer in model.get_submodule(part).children()]
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    one.update(0, next(one.loaded()))
    for hook in hooks:
        hook.remove()
    return counts


# -- quality at equal time --------------------------------------------------------------------------------------------


def trained(source: Path, overrides: list[str], steps: int, seed: str, folder: Path) -> dict[str, Any]:
    """One run of so many updates, and its figures on the test part."""
    out = str(folder / f"run-{time.monotonic_ns()}")
    given = [f"source={source}", f"train.steps={steps}", f"seed={seed}", *QUIET, *overrides]
    dbconvert.train(str(RECIPE), overrides=given, out=out)
    found = dbconvert.evaluate(out, part="test", overrides=["eval.draws=1"])
    return {"steps": steps, "metrics": found.metrics}


if __name__ == "__main__":
    sys.exit(main())
