"""What a training run starts from: a recipe with its paths settled, a package, the noise, the network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dbconvert.data.datasets import open_part
from dbconvert.data.examples import Examples
from dbconvert.engine.convert import single_block, whole_network
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.noise import fit_noise
from dbconvert.engine.package import PLAN, RECIPE, Package, open_package
from dbconvert.engine.paths import settled
from dbconvert.engine.split import split
from dbconvert.errors import UsageError
from dbconvert.events import Reporter
from dbconvert.plan import NoiseFit, Plan
from dbconvert.recipe import DataOptions, Recipe, keys, parse_overrides, read_recipe
from dbconvert.shipped import shipped
from dbconvert.tasks.registry import choose_task, reasons

PATHS = (("source",), ("package",), ("weights",), ("data", "source"))
PACKAGE = "package"


@dataclass(frozen=True)
class Origin:
    """A recipe and where it was read from."""

    recipe: Recipe
    path: Path
    name: str


def read_origin(target: str, overrides: Iterable[str]) -> Origin:
    """A recipe file, a package, or the name of a shipped recipe, with overrides and absolute paths.

    Paths in a file start at the file's folder, those on the command line at the working directory.

    Raises:
        UsageError: it is none of these, or the recipe is wrong.
    """
    overrides = list(overrides)
    path = find_recipe(target)
    recipe = read_recipe(path, overrides)
    given = set(keys(parse_overrides(overrides)))
    recipe = with_absolute_paths(recipe, path.parent, given)
    name = path.parent.resolve().name if path.name == RECIPE else path.stem
    return Origin(recipe, path.resolve(), name)


def find_recipe(target: str) -> Path:
    path = Path(target)
    if path.is_dir():
        if (path / PLAN).is_file() and (path / RECIPE).is_file():
            return path / RECIPE
        raise UsageError(f"{target} is not a package: it has no {PLAN}", hint="make one with dbconvert split")
    if path.is_file():
        return path
    by_name = shipped(f"recipes/{target}.yaml")
    if by_name.is_file():
        return by_name
    known = ", ".join(sorted(file.stem for file in shipped("recipes").glob("*.yaml")))
    raise UsageError(f"{target} does not exist", hint=f"give a recipe, a package, or a shipped recipe: {known}")


def with_absolute_paths(recipe: Recipe, folder: Path, on_command_line: set[tuple[str | int, ...]]) -> Recipe:
    source, package, weights, data = (
        settled(lookup(recipe, key), Path.cwd() if key in on_command_line else folder) for key in PATHS
    )
    return replace(recipe, source=source, package=package, weights=weights, data=replace(recipe.data, source=data))


def lookup(recipe: Recipe, key: tuple[str, ...]) -> str | None:
    value: Any = recipe
    for part in key:
        value = getattr(value, part)
    return None if value is None else str(value)


def get_package(recipe: Recipe, folder: Path, report: Reporter) -> Package:
    """The recipe's package; one that starts from a source is split into the run's folder first."""
    if recipe.package is not None:
        return open_package(Path(recipe.package))
    own = folder / PACKAGE
    if not (own / PLAN).is_file():
        split(
            str(recipe.source),
            out=str(own),
            options=recipe.split,
            noise=recipe.noise,
            task=recipe.task,
            weights=recipe.weights,
            seed=recipe.seed,
            report=report,
        )
    return open_package(own)


def settle_task(plan: Plan, recipe: Recipe) -> Plan:
    """The plan with a task: its own, or the recipe's where the split left it open.

    Raises:
        UsageError: there is none, or the recipe contradicts the plan.
    """
    if plan.task is not None:
        if recipe.task not in (None, plan.task):
            raise UsageError(f"task {recipe.task} is not the package's ({plan.task})", hint="split again with --task")
        return plan
    chosen = choose_task(plan.anatomy, recipe.task)
    if chosen is None:
        raise UsageError(
            "no task was decided for this network",
            why=reasons(plan.anatomy),
            hint="set task=NAME, or split with --task",
        )
    return replace(plan, task=chosen.name, target=chosen.decide(plan.anatomy))


def open_examples(data: DataOptions, part: str | None, plan: Plan) -> Examples | None:
    """One part of the data, None where the recipe names none."""
    if part is None or plan.target is None:
        return None
    return Examples(open_part(data, part), data, plan.anatomy, plan.target.classes)


def training_examples(data: DataOptions, plan: Plan) -> Examples:
    examples = open_examples(data, data.train, plan)
    assert examples is not None
    return examples


def build_network(package: Package, plan: Plan, recipe: Recipe, block: int | None) -> BlockwiseNetwork:
    """The network with the package's weights: whole, or one block with nothing of the others in memory."""
    if block is not None:
        return single_block(plan, package.source(), block, package.tensors(block=block))
    network = whole_network(plan, package.source())
    tensors = package.tensors()
    if package.plan.task is None:
        tensors = {**network.tensors(), **tensors}  # the task came later: its own parameters are fresh
    network.load(tensors, where=str(package.folder))
    if recipe.train.periphery == "frozen-target" and recipe.train.method == "blocks":
        network.give_own_periphery()
    return network


def get_noise(package: Package, network: BlockwiseNetwork, examples: Examples, *, keep: bool) -> NoiseFit:
    """The package's noise fit, or one made now from the target table and the label frequencies.

    Args:
        keep: write a new fit into the package, for the jobs of other blocks.
    """
    plan = network.plan
    fit = package.noise
    if fit is None:
        table = network.task.table(network.conditioning).detach().cpu()
        basis = "the label frequencies of the training data and the initial target table"
        fit = fit_noise(plan.noise, len(plan.blocks), table, examples.label_counts(), basis)
        if keep:
            package.keep_noise(fit)
    network.sigma_data = fit.sigma_data
    return fit


def check_block(block: int | None, plan: Plan, recipe: Recipe) -> None:
    """Refuses single-block jobs that could not stand alone."""
    if block is None:
        return
    if not 0 <= block < len(plan.blocks):
        raise UsageError(f"there is no block {block}", hint=f"blocks: 0 to {len(plan.blocks) - 1}")
    if recipe.train.method != "blocks":
        raise UsageError(f"train.method={recipe.train.method} does not train single blocks", hint="leave out --block")
    if recipe.train.periphery != "frozen-target":
        raise UsageError(
            "a single block cannot train the shared periphery, which the other blocks would not see",
            hint="add train.periphery=frozen-target, which freezes the target table and gives each block its own "
            "stem and readout",
        )


def steps_of(recipe: Recipe, examples: int) -> int:
    """Updates a block."""
    train = recipe.train
    if train.steps is not None:
        return train.steps
    if train.epochs is None:
        raise UsageError("how long to train?", hint="set train.steps or train.epochs")
    return train.epochs * max(1, examples // min(train.batch, examples))
