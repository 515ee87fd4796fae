"""Measures how like the digits the images of a small DiT are, and writes it to docs/dit.json.

    python docs/measure_dit.py            # what dit.json lacks; remove it to measure everything again
    python docs/measure_dit.py 1          # of one seed, so that several can run at once
    python docs/measure_dit.py --check    # 5 updates a block of every row and few samples, which are shown and not kept
    python docs/measure_dit.py --cells FOLDER       # runs that `compare` made, into docs/depth/dit_digits/frechet.json

Every row trains recipes/dit_digits.yaml in another form and draws SAMPLES images, classes in turn, from the sampler's
seed 0, on each grid of levels; their Frechet distances are those to the training part of the digits, to the test part,
and to all of them. Features are what enters the head of the digits ViT (recipes/vit_digits.yaml) after end-to-end
training with seed 0, so that the numbers compare with each other and with nothing else. The row `the training part
itself` says what data of the same kind get.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rows import keep, read

import dbconvert
from dbconvert.data.digits import Digits
from dbconvert.data.images import denormalise
from dbconvert.diffusion.frechet import frechet_distance
from dbconvert.diffusion.sampling import Grid
from dbconvert.engine.features import FeatureNetwork, moments_of, open_features
from dbconvert.engine.load import load
from dbconvert.engine.sample import Sampling, draw, drawing_task, labels_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "dit.json"
FORMS = ROOT / "docs" / "depth" / "dit_digits" / "frechet.json"
SEEDS = ["0", "1"]
ITSELF = "the training part itself"
ROWS = {
    "B = 3, equal-mass intervals": ["noise.partition=equal-mass"],
    "B = 3, intervals uniform in log sigma": ["noise.partition=uniform"],
    "B = 3, half on-policy": ["train.z=mixed"],
    "B = 3, half on-policy, with features": ["train.z=mixed", "split.context=features"],
    "end-to-end": ["train.method=end-to-end"],
    "shallow control": ["train.method=shallow"],
}
GRIDS: tuple[Grid, ...] = ("quantiles", "karras")
SAMPLES, BATCH = 2000, 250
FEATURES = "vit_digits, end-to-end, seed 0"


def main() -> int:
    parser = argparse.ArgumentParser(description="Frechet distances of the digits DiT.")
    parser.add_argument("seeds", nargs="*", default=SEEDS)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--cells", type=Path, help="the folder `cells` of a comparison: its runs in place of new ones")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        features = feature_network(Path(folder), given.check)
        images = {part: [Digits(part).images] for part in ("train", "test")}
        images["all"] = [*images["train"], *images["test"]]
        real = {part: moments_of(features, some) for part, some in images.items()}
        itself = {"test": frechet_distance(real["train"], real["test"]), "features": FEATURES}
        if given.cells is not None:
            measure_cells(given.cells, features, real)
        elif given.check:
            sys.stdout.write(f"{ITSELF}: {json.dumps(itself)}\n")
            for name, form in ROWS.items():
                row = measured([*form, "train.steps=5"], given.seeds[0], Path(folder), features, real, 20)
                sys.stdout.write(f"{name}: {json.dumps(row)}\n")
        else:
            keep(RESULTS, ITSELF, "0", itself)
            for seed in given.seeds:
                for name, form in ROWS.items():
                    if seed not in read(RESULTS)["rows"].get(name, {}):
                        sys.stderr.write(f"{name}, seed {seed}\n")
                        keep(RESULTS, name, seed, measured(form, seed, Path(folder), features, real, SAMPLES))
    return 0


def measure_cells(cells: Path, features: FeatureNetwork, real: dict[str, Any]) -> None:
    """Finished runs of a comparison, by their names in its table."""
    for cell in sorted(cells.iterdir()):
        told = json.loads((cell / "cell.json").read_text())
        sys.stderr.write(f"{told['name']}, seed {told['seed']}\n")
        keep(FORMS, told["name"], str(told["seed"]), distances(str(cell / "run"), features, real, SAMPLES))


def feature_network(folder: Path, check: bool) -> FeatureNetwork:
    out = str(folder / "features")
    overrides = ["train.method=end-to-end", "seed=0", "data.validation=null", "log.every=1000"]
    dbconvert.train(recipe("vit_digits"), overrides=[*overrides, *["train.steps=5"] * check], out=out)
    return open_features(out)


def measured(
    form: list[str], seed: str, folder: Path, features: FeatureNetwork, real: dict[str, Any], samples: int
) -> dict[str, Any]:
    """One run: the distances of its samples, and the seconds of one core that training and sampling took."""
    out = str(folder / f"run-{time.monotonic_ns()}")
    begun = time.process_time()
    overrides = [f"seed={seed}", "data.validation=null", "log.every=1000", *form]
    result = dbconvert.train(recipe("dit_digits"), overrides=overrides, out=out)
    trained = time.process_time()
    found = distances(out, features, real, samples)
    done = time.process_time()
    return {
        **found,
        "activations": max(unit.activations for unit in result.memory.units),
        "seconds_training": round(trained - begun),
        "seconds_sampling": round((done - trained) / len(GRIDS)),
    }


def distances(run: str, features: FeatureNetwork, real: dict[str, Any], samples: int) -> dict[str, Any]:
    """Of samples on each grid, to each part."""
    loaded = load(run)
    found: dict[str, Any] = {"samples": samples}
    for grid in GRIDS:
        sampling = Sampling(batch=BATCH, grid=grid)
        labels = labels_of(drawing_task(loaded, run), None, samples, loaded.label_dropout, sampling.guidance)
        drawn = draw(loaded.network, loaded.intervals, samples, labels, sampling, layers=loaded.layers)
        made = moments_of(features, torch.split(denormalise(drawn, loaded.data.image), BATCH))
        found[grid] = {part: frechet_distance(made, moments) for part, moments in real.items()}
        found["steps"] = sampling.steps
    return found


def recipe(name: str) -> str:
    return str(ROOT / "recipes" / f"{name}.yaml")


if __name__ == "__main__":
    sys.exit(main())
