"""Measures what docs/text.md says of masked text, and writes it to docs/masked.json; regenerate.py makes a table of it.

    python docs/measure_masked.py        # what masked.json lacks; remove it to measure everything again
    python docs/measure_masked.py 1      # of one seed, so that several can run at once

Every row trains recipes/mdm_text_tiny.yaml with other settings and evaluates it on text that was not trained on; all of
them run as many layers forward and backward.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rows import keep, read

import dbconvert

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "masked.json"
SEEDS = ("0", "1")
ROWS = {
    "3 blocks": [],
    "whole model": ["split.blocks=1"],
    "shallow control, 2 layers": ["train.method=shallow"],
}
DRAWS = 8


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        for seed in sys.argv[1:] or SEEDS:
            for name, overrides in ROWS.items():
                if seed not in read(RESULTS)["rows"].get(name, {}):
                    sys.stderr.write(f"{name}, seed {seed}\n")
                    keep(RESULTS, name, seed, trained(overrides, seed, Path(folder)))
    return 0


def trained(overrides: list[str], seed: str, folder: Path) -> dict[str, Any]:
    """One run: its figures, and the seconds of one core that it took."""
    out = str(folder / f"run-{time.monotonic_ns()}")
    torch.set_num_threads(1)
    begun = time.process_time()
    recipe = str(ROOT / "recipes" / "mdm_text_tiny.yaml")
    result = dbconvert.train(recipe, overrides=[f"seed={seed}", "data.validation=null", *overrides], out=out)
    seconds = time.process_time() - begun
    return {
        "metrics": evaluated(out),
        "activations": max(unit.activations for unit in result.memory.units),
        "seconds": round(seconds),
    }


def evaluated(run: str) -> dict[str, float]:
    return dbconvert.evaluate(run, part="test", overrides=[f"eval.draws={DRAWS}"]).metrics


if __name__ == "__main__":
    sys.exit(main())
