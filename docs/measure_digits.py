"""Measures the table of the digits' ViT in docs/images.md, and writes it to docs/digits.json.

    python docs/measure_digits.py            # what digits.json lacks; remove it to measure everything again
    python docs/measure_digits.py 1          # of one seed, so that several can run at once
    python docs/measure_digits.py --check    # 5 updates a block of every row, which are shown and not kept

Every row trains recipes/vit_digits.yaml with another number of blocks, partition and noise, and evaluates it on the
test part; all of them run as many layers forward and backward. About a minute of one core a row.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rows import keep, read

import dbconvert

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "digits.json"
SEEDS = ("0", "1")
LAYERS, BLOCKS = 6, (1, 2, 3, 6)
PARTITIONS = ("equal-mass", "uniform")
NOISES = ("auto", "edm")
IN_PLACE = ["split.entry=replace"]
PAPERS_CODE = [*IN_PLACE, "split.modulation=silu", "noise.rule=edm"]


def all_rows() -> dict[str, list[str]]:
    """Overrides of the recipe by name."""
    rows = {"end-to-end": ["train.method=end-to-end"]}
    for count in BLOCKS[1:]:
        own = ["train.method=shallow", f"split.blocks={count}"]
        rows[f"shallow control, {LAYERS // count} layer{'s' * (count < LAYERS)}"] = own
    for noise in NOISES:
        for count in BLOCKS:
            for partition in PARTITIONS if count > 1 else PARTITIONS[:1]:
                name = f"B = {count}, {noise}" + (f", {partition}" if count > 1 else "")
                rows[name] = [f"split.blocks={count}", f"noise.rule={noise}", f"noise.partition={partition}"]
    rows["B = 3, auto, equal-mass, in the class token's place"] = IN_PLACE
    rows["B = 3, edm, equal-mass, in the class token's place, SiLU behind the modulation"] = PAPERS_CODE
    return rows


def main() -> int:
    check = "--check" in sys.argv
    seeds = [argument for argument in sys.argv[1:] if argument != "--check"] or list(SEEDS)
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds[:1] if check else seeds:
            for name, overrides in all_rows().items():
                if check:
                    few = [*overrides, "train.steps=5"]
                    sys.stdout.write(f"{name}: {json.dumps(trained(few, seed, Path(folder)))}\n")
                elif seed not in read(RESULTS)["rows"].get(name, {}):
                    sys.stderr.write(f"{name}, seed {seed}\n")
                    keep(RESULTS, name, seed, trained(overrides, seed, Path(folder)))
    return 0


def trained(overrides: list[str], seed: str, folder: Path) -> dict[str, Any]:
    out = str(folder / f"run-{time.monotonic_ns()}")
    torch.set_num_threads(1)
    recipe = str(ROOT / "recipes" / "vit_digits.yaml")
    begun = time.process_time()
    common = [f"seed={seed}", "data.validation=null", "log.every=1000"]
    result = dbconvert.train(recipe, overrides=[*common, *overrides], out=out)
    seconds = time.process_time() - begun
    return {
        "metrics": dbconvert.evaluate(out, part="test", overrides=["eval.sigmas=0"]).metrics,
        "activations": max(unit.activations for unit in result.memory.units),
        "state": max(unit.state for unit in result.memory.units),
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
