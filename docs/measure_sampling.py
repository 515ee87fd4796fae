"""Measures one sampling step of a block beside one of the whole network, and writes it to docs/sampling.json.

    python docs/measure_sampling.py [LAYERS WIDTH BLOCKS BATCH]

A DiT of examples/dit.py with random weights on 32 x 32 images, patch 2, one thread: the unconverted network's own
forward pass, and one network evaluation of every block as the sampler makes it, in turns. Images pass all blocks, each
for its share of the steps, so that a sampling of blocks takes the mean over them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

import dbconvert
from dbconvert.engine.convert import whole_network
from dbconvert.engine.package import open_package
from dbconvert.recipe import SplitOptions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "sampling.json"
REPEATS = 20
MODEL = """
def build_model():
    return DiT(size=32, patch=2, channels=3, classes=10, depth={layers}, width={width}, heads={heads})


def example_inputs():
    return {{"images": torch.randn(2, 3, 32, 32), "time": torch.rand(2), "label": torch.tensor([3, 7])}}
"""


def main() -> int:
    layers, width, blocks, batch = (int(word) for word in sys.argv[1:5]) if len(sys.argv) > 4 else (12, 384, 3, 8)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        passes = made(Path(folder), layers, width, blocks, batch)
    for run in passes.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(REPEATS):
        for name, run in passes.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    each = [middle[name] for name in middle if name != "whole"]
    found = {
        "layers": layers,
        "width": width,
        "blocks": blocks,
        "batch": batch,
        "seconds": middle,
        "spread": {name: [min(taken), max(taken)] for name, taken in seconds.items()},
        "times_faster": middle["whole"] / statistics.mean(each),
        "goal": 0.95 * blocks,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread; torch {version('torch')}",
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def made(folder: Path, layers: int, width: int, blocks: int, batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """One pass of the unconverted network, and one evaluation of each block, by name."""
    text = (ROOT / "examples" / "dit.py").read_text(encoding="utf-8")
    text = text[: text.index("def example_inputs")] + MODEL.format(layers=layers, width=width, heads=width // 64)
    (folder / "model.py").write_text(text, encoding="utf-8")
    dbconvert.split(str(folder / "model.py"), out=str(folder / "p"), options=SplitOptions(blocks=blocks))
    package = open_package(folder / "p")
    own = package.source().build().eval()
    network = whole_network(package.plan, package.source()).eval()
    network.load(package.tensors(), where="package")
    z, label = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    sigma = torch.ones(batch)
    inputs = {"images": z, "label": label}

    def whole() -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = own(z, sigma, label)
        return out

    def of_block(block: int) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                return network.denoise(block, inputs, z, sigma)

        return run

    return {"whole": whole, **{f"block {b}": of_block(b) for b in range(blocks)}}


if __name__ == "__main__":
    sys.exit(main())
