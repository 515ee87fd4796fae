"""Measures what docs/text.md says of blocks that hear each other, and writes it to docs/context.json.

    python docs/measure_context.py            # what context.json lacks; remove it to measure everything again
    python docs/measure_context.py 1          # of one seed, so that several can run at once
    python docs/measure_context.py --check    # 5 updates a block of every row, which are shown and not kept
    python docs/measure_context.py --layers   # counts the layers of measured rows again, in 40 updates a block

Every row trains recipes/ar_text_tiny.yaml in another form and evaluates it on text that was not trained on. All of them
run as many layers forward and backward; the layers that run forward alone, before the block that is trained, are
counted beside them. docs/text.json has end-to-end training and the shallow control of the same recipe.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rows import keep, read

import dbconvert
from dbconvert.data.examples import LABEL
from dbconvert.diffusion.sampling import levels
from dbconvert.engine.infer import sample
from dbconvert.engine.load import load
from dbconvert.engine.loop import Loop
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.reading import open_examples

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "context.json"
SEEDS = ("0", "1")
ROWS = {
    "raw, noised (the paper's form)": ("raw", "noised"),
    "features, noised": ("features", "noised"),
    "estimate, noised": ("estimate", "noised"),
    "raw, on-policy": ("raw", "on-policy"),
    "features, mixed": ("features", "mixed"),
    "features, on-policy": ("features", "on-policy"),
}
EXAMPLES = 256
COUNTED = 40
"""Updates a block in which layers are counted again: how many run does not depend on what the network has learnt."""


def main() -> int:
    check = "--check" in sys.argv
    seeds = [argument for argument in sys.argv[1:] if not argument.startswith("--")] or list(SEEDS)
    with tempfile.TemporaryDirectory() as folder:
        if "--layers" in sys.argv:
            count_again(seeds, Path(folder))
            return 0
        for seed in seeds[:1] if check else seeds:
            for name, (context, z) in ROWS.items():
                form = [*form_of(context, z), *["train.steps=5"] * check]
                if check:
                    sys.stdout.write(f"{name}: {json.dumps(trained(form, seed, Path(folder)))}\n")
                elif seed not in read(RESULTS)["rows"].get(name, {}):
                    sys.stderr.write(f"{name}, seed {seed}\n")
                    keep(RESULTS, name, seed, trained(form, seed, Path(folder)))
    return 0


def form_of(context: str, z: str) -> list[str]:
    return [f"split.context={context}", f"train.z={z}"]


def count_again(seeds: list[str], folder: Path) -> None:
    for name, by_seed in read(RESULTS)["rows"].items():
        for seed in by_seed.keys() & set(seeds):
            sys.stderr.write(f"{name}, seed {seed}\n")
            layers = run([*form_of(*ROWS[name]), f"train.steps={COUNTED}"], seed, folder)[2]
            keep(RESULTS, name, seed, {**by_seed[seed], "layers": layers})


def run(form: list[str], seed: str, folder: Path) -> tuple[str, Any, dict[str, float]]:
    """Trains: the run's folder, what training says of it, and the layers that an example's update ran."""
    out = str(folder / f"run-{time.monotonic_ns()}")
    recipe = str(ROOT / "recipes" / "ar_text_tiny.yaml")
    overrides = [f"seed={seed}", "data.validation=null", "log.every=1000", *form]
    with counted() as layers:
        result = dbconvert.train(recipe, overrides=overrides, out=out)
    return out, result, {key: round(n / layers["examples"], 3) for key, n in layers.items() if key != "examples"}


def trained(form: list[str], seed: str, folder: Path) -> dict[str, Any]:
    """One run: its figures, the seconds of one core that it took, and the layers that an update ran."""
    torch.set_num_threads(1)
    begun = time.process_time()
    out, result, layers = run(form, seed, folder)
    seconds = time.process_time() - begun
    return {
        "metrics": dbconvert.evaluate(out, part="test", overrides=["eval.sigmas=0", "eval.draws=4"]).metrics,
        "evaluations": by_evaluation(out),
        "activations": max(unit.activations for unit in result.memory.units),
        "seconds": round(seconds),
        "layers": layers,
    }


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Layers times examples that updates run, forward and backward or forward only, and the examples of all updates."""
    found = {"trained": 0.0, "forward only": 0.0, "examples": 0.0}
    plain, update = BlockwiseNetwork.pass_through, Loop.update
    inside: list[bool] = []

    def passing(self: Any, block: int, passage: Any, *args: Any, **kwargs: Any) -> Any:
        if inside:
            examples = len(passage.condition)
            kind = "trained" if torch.is_grad_enabled() else "forward only"
            found[kind] += len(self.plan.layers_of(block)) * examples
            found["examples"] += examples if kind == "trained" else 0
        return plain(self, block, passage, *args, **kwargs)

    def updating(self: Any, *args: Any) -> Any:
        inside.append(True)
        try:
            return update(self, *args)
        finally:
            inside.clear()

    with patch.object(BlockwiseNetwork, "pass_through", passing), patch.object(Loop, "update", updating):
        yield found


@torch.no_grad()
def by_evaluation(run: str) -> list[dict[str, float]]:
    """Of every evaluation from z = 0: its level, and the loss and accuracy of the next token, on some of the text."""
    loaded = load(run)
    network, task = loaded.network, loaded.network.task
    examples = open_examples(loaded.data, "test", network.plan, loaded.tokenizer)
    batch = dict(examples.__getitems__(list(range(min(EXAMPLES, len(examples))))))
    labels = batch.pop(LABEL)
    outputs = list(sample(network, loaded.intervals, batch))
    return [
        {
            "level": level,
            "loss": task.mean(task.losses(output, labels), labels),
            "accuracy": task.mean(task.correct(output, labels), labels),
        }
        for level, output in zip(levels(loaded.intervals), outputs, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
