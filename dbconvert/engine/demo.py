"""demo: the main job on real data, from a plain model.py to one table."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from dbconvert.data_options import DataOptions
from dbconvert.engine.assemble import assemble
from dbconvert.engine.evaluate import evaluate
from dbconvert.engine.memory import MemoryReport
from dbconvert.engine.metrics import Metrics
from dbconvert.engine.package import Package, open_package
from dbconvert.engine.runs import new_run_folder
from dbconvert.engine.split import split
from dbconvert.engine.train import train
from dbconvert.events import Note, Reporter, silent
from dbconvert.files import MARKER, write_text
from dbconvert.recipe import SplitOptions, read_recipe
from dbconvert.schema import to_data
from dbconvert.shipped import shipped

RECIPE = "recipes/vit_digits.yaml"
MODEL = "examples/vit.py"
METHODS = ("blocks", "end-to-end", "shallow")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        accuracy: on the test part; of blocks from z = 0.
        updates: of the whole run.
        state: parameters, gradients and optimiser state (bytes) that one update needs.
        held: the same for all that the run keeps in memory.
        activations: bytes that autograd keeps in one update.
    """

    name: str
    layers: int
    updates: int
    accuracy: float
    state: int
    held: int
    activations: int
    metrics: Metrics


def demo(*, seed: int = 0, out: str | None = None, report: Reporter = silent) -> tuple[Path, list[Row]]:
    """Writes an ordinary ViT as model.py, splits, trains, assembles and evaluates it, and trains both controls.

    The data are scikit-learn's digits in fixed parts; the recipe was tuned on validation, the table is on test.

    Returns:
        the folder it worked in, and the rows: assembled blocks, end-to-end, shallow control.
    """
    folder = Path(out) if out is not None else new_run_folder("demo")
    folder.mkdir(parents=True, exist_ok=False)
    (folder / MARKER).touch()
    recipe = read_recipe(shipped(RECIPE))
    model = folder / "model.py"
    shutil.copyfile(shipped(MODEL), model)
    blocks = recipe.split.blocks or 1
    say(report, f"dbconvert split model.py --blocks {blocks} --data digits -o package")
    data = DataOptions(source="digits", image=recipe.data.image)
    split(
        str(model),
        out=str(folder / "package"),
        options=SplitOptions(blocks=blocks),
        data=data,
        seed=seed,
        report=report,
    )
    own = write_recipe(folder, seed)
    rows = []
    for method in METHODS:
        say(report, f"dbconvert train vit_digits.yaml train.method={method} -o {method}")
        result = train(str(own), overrides=[f"train.method={method}"], out=str(folder / method), report=report)
        target = folder / method
        if method == "blocks":
            say(report, "dbconvert assemble blocks -o model.safetensors")
            target = assemble([str(target)], out=str(folder / "model.safetensors"), report=report)
        say(report, f"dbconvert eval {target.name}")
        metrics = evaluate(str(target), report=report).metrics
        package = open_package(folder / "package")
        rows.append(row(method, package, recipe.train.steps or 0, metrics, result.memory))
    return folder, rows


def say(report: Reporter, command: str) -> None:
    report(Note(f"$ {command}"))


def write_recipe(folder: Path, seed: int) -> Path:
    """The shipped recipe, starting from the demo's package instead of a source."""
    content = to_data(read_recipe(shipped(RECIPE)))
    kept = {k: v for k, v in content.items() if k not in ("source", "weights", "split", "noise")}
    path = folder / "vit_digits.yaml"
    write_text(path, yaml.safe_dump({**kept, "package": "package", "seed": seed}, sort_keys=False))
    return path


def row(method: str, package: Package, steps: int, metrics: Metrics, memory: MemoryReport) -> Row:
    depth, blocks = package.plan.anatomy.depth, len(package.plan.blocks)
    largest = len(package.plan.layers_of(0))
    names = {
        "blocks": (f"{blocks} blocks, assembled", largest, steps * blocks),
        "end-to-end": ("end-to-end", depth, steps),
        "shallow": (f"shallow control, {largest} layers", largest, steps * blocks),
    }
    name, layers, updates = names[method]
    accuracy = metrics["accuracy_zero"] if method == "blocks" else metrics["accuracy"]
    unit = memory.largest
    held = unit.state if method != "blocks" else memory.resident_state
    return Row(name, layers, updates, accuracy, unit.state, held, unit.activations, metrics)
