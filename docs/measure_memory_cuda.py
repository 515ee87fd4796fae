"""The largest Llama that trains on a CUDA device, in blocks and end-to-end, written to docs/memory_cuda.json.

    python docs/measure_memory_cuda.py --memory 8     # what memory_cuda.json lacks, within so many GiB of the device
    python docs/measure_memory_cuda.py --smoke        # tiny networks, on any machine, printed and not kept

Networks are Llamas of random weights that differ in depth. For each form of training the depth is doubled until an
update fails, then halved in: by blocks (B = 8, inactive blocks in host memory) and end-to-end, with the same optimiser,
both under torch.cuda.set_per_process_memory_fraction. Then a network of the shape of Llama 3 8B in 4 blocks, away, with
bf16 weights, 8-bit state and checkpointing (torchao is needed): once as it is, once with the optimiser's step in the
backward pass. A trial is a process of its own, takes two updates of each of the first two blocks, and is told with the
most that PyTorch allocated and reserved. Weights are drawn as networks are built. What is kept is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbconvert.data_options import DataOptions
from dbconvert.engine.convert import fill_blocks, hollow_network, whole_network
from dbconvert.engine.jobs import make_job
from dbconvert.engine.loop import Loop
from dbconvert.engine.methods import METHODS
from dbconvert.engine.mover import Mover
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.reading import stand_in
from dbconvert.engine.split import split
from dbconvert.engine.stores import HostStore
from dbconvert.engine.train import make_accelerator
from dbconvert.events import silent
from dbconvert.recipe import LogOptions, OptimizerOptions, Recipe, SplitOptions, TrainOptions
from dbconvert.sources.resolve import open_source

RESULTS = Path(__file__).resolve().parent / "memory_cuda.json"
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "vocab_size": 32000}
EIGHT = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "num_hidden_layers": 32,
}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
PLAIN = {"method": "blocks", "blocks": 8, "precision": "bf16", "optimizer": "adamw", "batch": 1, "length": 512}
FORMS = {"8 blocks, away": PLAIN, "end-to-end": {**PLAIN, "method": "end-to-end"}}
LOW = {**PLAIN, "blocks": 4, "precision": "bf16-true", "optimizer": "adamw8bit", "checkpointing": True}
LLAMA_8B = {"8B, 4 blocks, away": LOW, "8B, 4 blocks, away, step in backward": {**LOW, "in_backward": True}}
DEEPEST, TURN = 512, 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=8, help="GiB of the device that the search may use")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trial is not None:
        sys.stdout.write(json.dumps(trial(json.loads(given.trial))) + "\n")
        return 0
    if not torch.cuda.is_available() and not given.smoke:
        sys.stderr.write("no CUDA device: nothing was measured\n")
        return 1
    path = Path(tempfile.mkdtemp()) / "smoke.json" if given.smoke else RESULTS
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"trials": {}}
    results["versions"] = {name: version(name) for name in ("torch", "transformers")}
    results["device"] = "CPU" if given.smoke else torch.cuda.get_device_name()
    results["memory_gib"] = given.memory
    for name, form in FORMS.items():
        asked = {**form, **(TINY if given.smoke else SHAPE), "memory": given.memory}
        if given.smoke:
            asked["length"] = 16
            measured(results, path, f"{name}, 8 layers", {**asked, "num_hidden_layers": 8})
        else:
            results.setdefault("largest", {})[name] = largest(results, path, name, asked)
    if find_spec("torchao") is not None and not given.smoke:
        for name, form in LLAMA_8B.items():
            measured(results, path, name, {**form, **EIGHT, "memory": 0})
    path.write_text(json.dumps(results, indent=1) + "\n")
    if given.smoke:
        sys.stdout.write(path.read_text())
        return int(any("failed" in one for one in results["trials"].values()))
    return 0


def largest(results: dict[str, Any], path: Path, name: str, asked: dict[str, Any]) -> int:
    """The most layers, a multiple of 8, that train."""

    def fits(layers: int) -> bool:
        told = measured(results, path, f"{name}, {layers} layers", {**asked, "num_hidden_layers": layers})
        if "out of memory" not in told.get("failed", "out of memory"):
            raise SystemExit(told["failed"])
        return "failed" not in told

    good, bad = 0, 8
    while bad <= DEEPEST and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 8:
        middle = (good + bad) // 16 * 8
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def measured(results: dict[str, Any], path: Path, name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """A trial in a process of its own, or what is known of it."""
    if name not in results["trials"]:
        command = [sys.executable, __file__, "--trial", json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        told = json.loads(lines[-1]) if done.returncode == 0 else {"failed": done.stderr.strip().splitlines()[-1]}
        results["trials"][name] = {**asked, **told}
        path.write_text(json.dumps(results, indent=1) + "\n")
    found: dict[str, Any] = results["trials"][name]
    return found


def trial(asked: dict[str, Any]) -> dict[str, Any]:
    """Two updates of each of the first two blocks; what they took."""
    cuda = torch.cuda.is_available()
    if cuda and asked["memory"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(asked["memory"] * 2**30 / total)
    with tempfile.TemporaryDirectory() as folder:
        loop = prepared(asked, Path(folder), cuda)
        order = [block for block in list(loop.job.units)[:2] for _ in range(TURN)]
        loop.order = order
        loop.run()
        lines = map(json.loads, loop.metrics_path.read_text().splitlines())
        told = {
            "parameters": sum(p.numel() for p in loop.job.network.parameters()),
            "seconds": [line["seconds"] for line in lines],
        }
    if cuda:
        told["allocated"], told["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return told


def prepared(asked: dict[str, Any], folder: Path, cuda: bool) -> Loop:
    """A loop over a network whose weights are drawn as it is built."""
    layers, width = asked["num_hidden_layers"], asked["hidden_size"]
    keys = [key for key in asked if key in EIGHT]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **{key: asked[key] for key in keys}}
    config.update(max_position_embeddings=2 * asked["length"], tie_word_embeddings=False)
    (folder / "config.json").write_text(json.dumps(config))
    blocks = min(asked["blocks"], layers)
    options = SplitOptions(blocks=blocks, condition_width=max(32, width // 16))
    plan = split(str(folder), options=options, task="causal_lm", dry_run=True).plan
    away = asked["method"] == "blocks"
    recipe = Recipe(
        source=str(folder),
        data=DataOptions(length=asked["length"]),
        optimizer=OptimizerOptions(name=asked["optimizer"], in_backward=asked.get("in_backward", False)),
        train=TrainOptions(
            method=asked["method"],
            steps=TURN,
            batch=asked["batch"],
            order="rotate",
            steps_per_turn=TURN,
            inactive="host" if away else "resident",
            precision=asked["precision"] if cuda else "fp32",
            checkpointing=asked.get("checkpointing", False),
            clip=None if asked.get("in_backward") else 1.0,
            checkpoint_every=0,
        ),
        log=LogOptions(every=1),
    )
    source, mover = open_source(str(folder)), None
    if away:
        network = hollow_network(plan, source)
        dtype = torch.bfloat16 if recipe.train.precision == "bf16-true" else torch.float32
        store = HostStore(pinned=cuda)
        homes = fill_blocks(network, lambda block: drawn(network, block), store, own=False, dtype=dtype)
        mover = Mover(network, homes, store)
    else:
        network = whole_network(plan, source)
    if recipe.train.checkpointing:
        network.run.checkpointed = range(layers)
    method, examples = METHODS[asked["method"]], stand_in(recipe, plan)
    job = make_job(method, network, plan.preview, recipe, TURN, examples, None, folder)
    job.mover = mover
    return Loop(job, make_accelerator(recipe, folder), silent)


def drawn(network: BlockwiseNetwork, block: int) -> dict[str, Tensor]:
    """What a block and the periphery lack, small random numbers."""
    empty = {key: value for key, value in network.tensors().items() if value.is_meta}
    return {
        key: 0.02 * torch.randn(value.shape, dtype=value.dtype)
        for key, value in empty.items()
        if network.owner(key) in (None, block)
    }


if __name__ == "__main__":
    sys.exit(main())
