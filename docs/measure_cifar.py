"""recipes/vit_cifar100.yaml on a CPU for 200 updates a block: the loss falls, resumes, evaluates. To docs/cifar.json.

    python docs/measure_cifar.py MOSAICS                      # some minutes of two cores
    python docs/measure_cifar.py MOSAICS --steps 4 --show     # a few updates, shown and not kept

MOSAICS is a folder with cifar100_train.jpg, cifar100_test.jpg and their labels. The commands are a user's; the training
is killed once it has saved a state, and resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "cifar.json"
BLOCKS = 3
COMMAND = [str(Path(sys.executable).with_name("dbconvert"))]
ENDS = 20
"""Updates of a block at either end whose losses are averaged."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mosaics", help="the folder of the mosaics")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--show", action="store_true", help="keep nothing")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(given, Path(folder))
    found["versions"] = {name: version(name) for name in ("dbconvert", "torch")}
    found["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    text = json.dumps(found, indent=1) + "\n"
    sys.stdout.write(text) if given.show else RESULTS.write_text(text)
    return int(not all(last < first for first, last in found["losses"].values()) and not given.show)


def measured(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    run = folder / "run"
    every = max(1, given.steps * BLOCKS // 2)
    data = [f"data.source={Path(given.mosaics).resolve()}", "data.tile=32"]
    overrides = [*data, f"train.steps={given.steps}", f"train.batch={given.batch}", "log.every=1"]
    command = [*COMMAND, "train", "vit_cifar100", *overrides, f"train.checkpoint_every={every}", "-o", str(run)]
    begun = time.perf_counter()
    resumed_at = killed(command, run)
    subprocess.run([*COMMAND, "train", "vit_cifar100", "--resume", "-o", str(run)], check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - begun
    asked = ["data.test=test[:2000]", "eval.draws=2", "eval.sigmas=0", "--json"]
    told = subprocess.run([*COMMAND, "eval", str(run), *asked], check=True, capture_output=True, text=True)
    return {
        "steps": given.steps,
        "batch": given.batch,
        "resumed_at": resumed_at,
        "losses": losses(run),
        "metrics": json.loads(told.stdout)["metrics"],
        "seconds": round(seconds),
    }


def killed(command: list[str], run: Path) -> int:
    """Starts a training and kills it once it has a state; the update of that state."""
    process = subprocess.Popen(command, stdout=sys.stderr)
    while process.poll() is None and not any((run / "checkpoints").glob("update-*")):
        time.sleep(0.05)
    if process.poll() is not None:
        raise SystemExit("the training ended before it was killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = max((run / "checkpoints").glob("update-*"))
    return int(state.name.removeprefix("update-"))


def losses(run: Path) -> dict[str, list[float]]:
    """Of each block: the mean loss of its first and of its last updates."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for block in range(BLOCKS):
        own = [line["loss"] for line in lines if line.get("block") == block]
        ends = min(ENDS, max(1, len(own) // 2))
        found[str(block)] = [round(statistics.mean(part), 4) for part in (own[:ends], own[-ends:])]
    return found


if __name__ == "__main__":
    sys.exit(main())
