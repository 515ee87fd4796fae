"""recipes/vit_cifar100.yaml on CUDA, written to docs/cifar_cuda.json: accuracy, images a second, and their floor.

    python docs/measure_cifar_cuda.py MOSAICS --minutes 60 --turn 9   # what cifar_cuda.json lacks, nine minutes of it
    python docs/measure_cifar_cuda.py --smoke                         # a few small updates a row, on any machine

MOSAICS is a folder with cifar100_train.jpg, cifar100_test.jpg and their labels (docs/images.md). First the speed of
every row for some updates: eager and with captured CUDA graphs, augmented, and on one batch that is already there, the
floor. From that follows for how many epochs all rows together take `--minutes`; the number is kept. Then end-to-end,
three blocks and the shallow control, for equal layer evaluations, with the same augmentation. A turn that is over stops
at a saved state in `--state`, and the next one goes on. Every row runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_loop import OutOfTime, device_loop
from PIL import Image

import dbconvert

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "cifar_cuda.json"
RECIPE = str(ROOT / "recipes" / "vit_cifar100.yaml")
PICTURES, EPOCHS = 50_000, 500
ROWS = {
    "end-to-end": ["train.method=end-to-end"],
    "3 blocks": [],
    "shallow control, 4 layers": ["train.method=shallow"],
}
PACE = {"end-to-end": 1, "3 blocks": 3, "shallow control, 4 layers": 3}
"""Updates for one of end-to-end training, which runs as many layers."""
SPEEDS = {
    "eager": {"graphed": False, "floor": False},
    "captured": {"graphed": True, "floor": False},
    "captured, floor": {"graphed": True, "floor": True},
}
CALIBRATION = 400
RESERVE = 0.8
"""Share of the minutes that is trained in; the rest is for starting and evaluating."""


def main() -> int:
    given = arguments()
    if given.row is not None:
        sys.stdout.write(json.dumps(row(given)) + "\n")
        return 0
    if not torch.cuda.is_available() and not given.smoke:
        sys.stderr.write("no CUDA device: nothing was measured\n")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        if given.smoke:
            given.mosaics, given.state = str(toy_mosaics(Path(folder))), str(Path(folder) / "state")
        return measured(given, Path(folder) / "smoke.json" if given.smoke else RESULTS)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mosaics", nargs="?", help="the folder of the mosaics")
    parser.add_argument("--minutes", type=float, default=60, help="for all rows together")
    parser.add_argument("--turn", type=float, default=1e6, help="minutes of this turn")
    parser.add_argument("--state", default=str(ROOT / "runs" / "cifar_cuda"), help="where runs are kept between turns")
    parser.add_argument("--smoke", action="store_true")
    for name in ("--row", "--speed"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1e9, help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.mosaics is None and not found.smoke:
        parser.error("name the folder of the mosaics")
    return found


def measured(given: argparse.Namespace, path: Path) -> int:
    begun = time.monotonic()
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"speed": {}, "rows": {}}
    results["versions"] = {name: version(name) for name in ("dbconvert", "torch")}
    results["device"] = "CPU" if given.smoke else torch.cuda.get_device_name()

    def left() -> float:
        return float(given.turn) * 60 - (time.monotonic() - begun)

    for name in ROWS:
        for speed in ["eager"] if given.smoke else SPEEDS:
            by_speed = results["speed"].setdefault(name, {})
            if "images_per_second" not in by_speed.get(speed, {}) and left() > 0:
                by_speed[speed] = in_a_process(given, name, left(), speed=speed)
                path.write_text(json.dumps(results, indent=1) + "\n")
    if "epochs" not in results and left() > 0:
        results["epochs"] = 1 if given.smoke else affordable(results["speed"], given.minutes)
    for name in ROWS:
        if "metrics" not in results["rows"].get(name, {}) and left() > 0:
            found = in_a_process(given, name, left(), epochs=results["epochs"])
            results["rows"][name] = merged(results["rows"].get(name, {}), found)
            path.write_text(json.dumps(results, indent=1) + "\n")
    if given.smoke:
        sys.stdout.write(path.read_text())
    every = [*results["rows"].values(), *(one for speeds in results["speed"].values() for one in speeds.values())]
    return int(any("failed" in one for one in every))


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A row over its turns."""
    return {**now, "seconds": round(before.get("seconds", 0) + now.get("seconds", 0))}


def affordable(speed: dict[str, Any], minutes: float) -> int:
    """Epochs of end-to-end training for which all rows take that long."""
    seconds = sum(PACE[name] * PICTURES / fastest(speed[name])[1] for name in ROWS)
    return max(1, min(EPOCHS, int(minutes * 60 * RESERVE / seconds)))


def fastest(speeds: dict[str, Any]) -> tuple[str, float]:
    """Of the ways to train, without the floor."""
    rates = {k: v["images_per_second"] for k, v in speeds.items() if "failed" not in v and not SPEEDS[k]["floor"]}
    name = max(rates, key=lambda key: rates[key])
    return name, rates[name]


def in_a_process(given: argparse.Namespace, name: str, seconds: float, **options: Any) -> dict[str, Any]:
    sys.stderr.write(f"{name}, {options}\n")
    command = [sys.executable, __file__, given.mosaics, "--state", given.state, "--row", name]
    command += ["--seconds", str(seconds), *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run([*command, *["--smoke"] * given.smoke], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(given: argparse.Namespace) -> dict[str, Any]:
    """One turn of a row, or its speed."""
    training = given.speed is None
    if training:
        chosen = {"graphed": graphed(given.row), "deadline": time.monotonic() + given.seconds}
        length = [f"train.epochs={given.epochs}", "data.validation=test"]
    else:
        chosen = SPEEDS[given.speed]
        updates = 60 if given.smoke else CALIBRATION
        length = [f"train.steps={max(1, updates // PACE[given.row])}", "data.validation=null"]
    overrides = [
        *(*ROWS[given.row], *length, f"data.source={Path(given.mosaics).resolve()}", "data.tile=32"),
        *("train.checkpoint_every=2000", "log.every=20", "eval.batch=1000", "eval.sigmas=0"),
        *(small() if given.smoke else ["train.precision=bf16", "eval.draws=8"]),
    ]
    with tempfile.TemporaryDirectory() as folder, device_loop(**chosen) as made:
        out = Path(given.state) / given.row.replace(" ", "-") if training else Path(folder) / "run"
        begun = time.perf_counter()
        try:
            resume = (out / "run.json").is_file()
            metrics = dbconvert.train(
                RECIPE, overrides=() if resume else overrides, resume=resume, out=str(out)
            ).metrics
        except OutOfTime:
            metrics = {}
        loop = made[0]
        found: dict[str, Any] = {"updates": loop.updates, "seconds": round(time.perf_counter() - begun)}
        if len(loop.rates) > 1:
            found["images_per_second"] = round(loop.images_per_second)
    if torch.cuda.is_available():
        found["peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return {**found, **({"metrics": metrics} if training and metrics else {})}


def graphed(name: str) -> bool:
    """Whether capturing was faster, as the first rows found it."""
    if not RESULTS.exists():
        return False
    speeds = json.loads(RESULTS.read_text())["speed"].get(name)
    return bool(speeds) and SPEEDS[fastest(speeds)[0]]["graphed"]


# -- smoke ----------------------------------------------------------------------------------------------------------


def small() -> list[str]:
    """A network and a training of seconds."""
    file = Path(tempfile.gettempdir()) / "dbconvert_small_vit.py"
    text = (ROOT / "examples" / "vit.py").read_text().replace("depth=12, width=128", "depth=6, width=16")
    file.write_text(text)
    return [f"source={file}:vit_cifar100", "train.batch=8", "eval.draws=1"]


def toy_mosaics(folder: Path) -> Path:
    """Random pictures laid out as CIFAR-100's are."""
    generator = np.random.default_rng(0)
    for part, rows in (("train", 20), ("test", 2)):
        Image.fromarray(generator.integers(0, 256, (rows * 32, 8 * 32, 3), dtype=np.uint8)).save(
            folder / f"cifar100_{part}.jpg"
        )
        labels = generator.integers(0, 100, rows * 8, dtype=np.uint8)
        (folder / f"cifar100_{part}_labels.u8").write_bytes(labels.tobytes())
    return folder


if __name__ == "__main__":
    sys.exit(main())
