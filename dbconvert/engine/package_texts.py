"""The files of a package that people read: recipe.yaml, README.md, train.py."""

from __future__ import annotations

from dbconvert.data_options import DataOptions
from dbconvert.engine.decide import listening
from dbconvert.plan import NoiseFit, Plan
from dbconvert.recipe import Recipe
from dbconvert.schema import to_data, to_yaml
from dbconvert.tasks.image_diffusion import picture_in_words
from dbconvert.tasks.label_place import in_words
from dbconvert.tasks.registry import named, reasons

EPOCHS = 100
ALONE = "dbconvert train . --block 0 train.periphery=frozen-target   # one block, an independent job"
AFTER = "dbconvert train . --block 1 train.periphery=frozen-target   # the next one, after that"
SECTIONS = ("data", "optimizer", "train", "eval", "log")


def package_recipe(plan: Plan, data: DataOptions | None) -> str:
    """A recipe that is complete but for the data, or complete where data was given."""
    defaults = to_data(Recipe())
    content = {"package": ".", "task": plan.task, **{section: defaults[section] for section in SECTIONS}}
    content["train"]["epochs"] = EPOCHS
    content["train"]["z"] = None if plan.task is None else named(plan.task).zs[0]
    if data is not None:
        content["data"] = to_data(data)
    content["seed"] = 0
    head = "# How to train this package: dbconvert train THIS_FOLDER [key=value ...]\n"
    if data is None or data.source is None:
        head += "# data.source is missing: digits, a hub id, a folder, parquet, or file.py:function.\n"
    if plan.task is None:
        head += f"# task is missing: {reasons(plan.anatomy)}\n"
    return head + to_yaml(content)


def train_script() -> str:
    return '''"""Trains this package: python train.py, or accelerate launch train.py [key=value ...]."""

import sys
from pathlib import Path

from dbconvert.cli.main import main

if __name__ == "__main__":
    main(["train", str(Path(__file__).parent), *sys.argv[1:]])
'''


def package_readme(plan: Plan, noise: NoiseFit) -> str:
    anatomy = plan.anatomy
    share = noise.intervals().share
    rows = [
        f"| {b} | {first}-{last} | {low:.4g} to {high:.4g} | {100 * share(b):.1f} % |"
        for b, (first, last) in enumerate(plan.blocks)
        for low, high in [noise.intervals().owned(b)]
    ]
    kind = "entropy" if noise.rule == "auto" else "mass"
    scale = "" if noise.rule == "mask" else f"; sigma_data {noise.sigma_data:.4g}"
    lines = [
        f"# {anatomy.network} in {len(plan.blocks)} blocks",
        "",
        f"Written by dbconvert {plan.versions['dbconvert']} from `{plan.source.location}`"
        f" (`{plan.source.name}`, SHA-256 `{plan.source.sha256[:12]}`); weights: {plan.weights}.",
        f"The stack `{anatomy.stack}` has {anatomy.depth} layers of width {anatomy.width}; gates start at"
        f" `{plan.start}`; the conditioning vector is {plan.condition_width} wide.",
        "",
        f"| block | layers | {noise.level} | {kind} |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        *placement_words(plan),
        f"Noise rule `{noise.rule}`: {noise.basis}{scale}.",
        "",
        "![noise intervals](noise.png)",
        "",
        *([independence(plan), ""] if len(plan.blocks) > 1 else []),
        "```bash",
        "dbconvert train . data.source=...            # all blocks; or: accelerate launch train.py",
        *([ALONE] if plan.context == "raw" else [ALONE, AFTER]),
        "dbconvert assemble -o model.safetensors      # the newest complete run",
        "```",
        "",
        "| file | content |",
        "| --- | --- |",
        "| plan.json | everything decided, with digests of source and weights |",
        "| recipe.yaml | how to train; every key can be overridden as key=value |",
        "| weights/ | one safetensors file a block, one for the periphery (stem, target table, readout) |",
        "| model/ | the network's own source |",
        "| noise.json | the noise that was fitted (once there is data) |",
        "| noise.png | the density of noise levels, a band a block |",
        "| train.py | the same as `dbconvert train .` |",
        "",
    ]
    return "\n".join(lines)


def independence(plan: Plan) -> str:
    """What blocks need of each other."""
    if plan.context != "raw":
        return f"{listening(plan).capitalize()}."
    default = "" if plan.task is None or named(plan.task).zs[0] != "noised" else ", the default,"
    return (
        f"With train.z=noised{default} blocks need nothing of each other; with on-policy or mixed each needs the "
        "forward pass of those before it, or their finished runs where it trains alone."
    )


def placement_words(plan: Plan) -> list[str]:
    """Where what is noisy enters and what is read or predicted, and what else is not usual."""
    words = "" if plan.target is None else in_words(plan.target) or picture_in_words(plan.anatomy, plan.target)
    curve = "Shifts, scales and gates are SiLU of a linear." if plan.modulation == "silu" else ""
    told = [f"{words[0].upper()}{words[1:]}."] if words else []
    return [line for text in (*told, curve) if text for line in (text, "")]


def checkpoint_readme(plan: Plan) -> str:
    """What lies beside an assembled checkpoint."""
    return f"""# {plan.anatomy.network} in {len(plan.blocks)} trained blocks

Trained block by block with dbconvert {plan.versions["dbconvert"]}, from `{plan.source.location}`; weights before
training: {plan.weights}. The plan, the noise and what the data looked like are in the metadata of the safetensors
file or index.

It runs in block form only: loaded as an ordinary `{plan.source.name}` it gives nonsense, because each block
denoises.

```python
import dbconvert

network = dbconvert.load("THIS_FOLDER")
output = network(inputs)  # block by block, from z = 0
```
"""
