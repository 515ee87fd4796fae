"""Measures what docs/text.md says, and writes it to docs/text.json; regenerate.py makes the tables of it.

    python docs/measure_text.py            # what text.json lacks
    python docs/measure_text.py --fresh    # everything again (about 40 minutes of one core)
    python docs/measure_text.py --held     # only what an update holds, which one update tells

Every row trains recipes/ar_text_tiny.yaml with other settings and evaluates it on text that was not trained on; all of
them run as many layers forward and backward.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dbconvert
from dbconvert.engine.train import TrainResult

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "text.json"
SEEDS = ("0", "1")
TABLE_DEVIATION = 0.102
"""sigma_data that `auto` finds for unit vectors of 96 numbers."""
ROWS = {
    "auto": [],
    "edm": ["noise.rule=edm"],
    "edm, sigma_data of the table": ["noise.rule=edm", f"noise.sigma_data={TABLE_DEVIATION}"],
    "end-to-end": ["train.method=end-to-end"],
    "shallow control, 2 layers": ["train.method=shallow"],
    "auto, a level for every position": ["noise.per=position"],
    "auto, fresh target table": ["split.table=fresh"],
    "auto, refitted after 1/4 and 1/2": ["noise.refit=[0.25, 0.5]"],
}
LEVELS = 24


def main() -> int:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and "--fresh" not in sys.argv else {}
    results = {**machine(), **results}
    with tempfile.TemporaryDirectory() as folder:
        if "--held" in sys.argv:
            count_again(results["rows"], Path(folder))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            return 0
        for seed in SEEDS:
            for name, overrides in ROWS.items():
                if lacks(results.setdefault("rows", {}).setdefault(name, {}).get(seed)):
                    sys.stderr.write(f"{name}, seed {seed}\n")
                    results["rows"][name][seed] = trained(overrides, seed, Path(folder))
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def lacks(row: dict[str, Any] | None) -> bool:
    """Whether there is no row, or one that was measured before `eval` told the bound."""
    return row is None or ("loss_first" in row["metrics"] and "nats_bound" not in row["metrics"])


def machine() -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in ("dbconvert", "torch")},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }


def count_again(rows: dict[str, Any], folder: Path) -> None:
    """The activations of all rows: they do not depend on the seed, or on how long is trained."""
    for name, by_seed in rows.items():
        held = train([*ROWS[name], "train.steps=1"], str(folder / f"one-{time.monotonic_ns()}")).memory
        for one in by_seed.values():
            one["activations"] = max(unit.activations for unit in held.units)


def train(overrides: list[str], out: str) -> TrainResult:
    common = ["data.validation=null", "log.every=1000"]
    return dbconvert.train(str(ROOT / "recipes" / "ar_text_tiny.yaml"), overrides=[*common, *overrides], out=out)


def trained(overrides: list[str], seed: str, folder: Path) -> dict[str, Any]:
    out = str(folder / f"run-{time.monotonic_ns()}")
    torch.set_num_threads(1)
    begun = time.process_time()
    result = train([f"seed={seed}", *overrides], out)
    seconds = time.process_time() - begun
    found = dbconvert.evaluate(out, part="test", overrides=[f"eval.sigmas={LEVELS}", "eval.draws=4"])
    noise = json.loads((Path(out) / "noise.json").read_text())
    return {
        "metrics": found.metrics,
        "activations": max(unit.activations for unit in result.memory.units),
        "seconds": round(seconds),
        "boundaries": noise["boundaries"],
        "sigma_data": noise["sigma_data"],
    }


if __name__ == "__main__":
    sys.exit(main())
