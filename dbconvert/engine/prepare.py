"""What a training run starts from: a recipe with its paths settled, a package, the noise, the network, the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dbconvert.data.batches import Data
from dbconvert.data.tokenizers import Tokenizer
from dbconvert.data_options import LatentOptions
from dbconvert.engine.convert import fill_blocks, hollow_network, single_block, whole_network
from dbconvert.engine.finished import FinishedRun
from dbconvert.engine.jobs import make_job
from dbconvert.engine.method import Job
from dbconvert.engine.methods import METHODS
from dbconvert.engine.mover import Mover
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.noise import fit_noise, refuse_misfit
from dbconvert.engine.optimizers import state_size
from dbconvert.engine.package import MODEL, PLAN, RECIPE, Package, open_package
from dbconvert.engine.paths import settled
from dbconvert.engine.predecessors import find, refuse_other_noise, tensors_of, told_of
from dbconvert.engine.reading import find_tokenizer, open_examples, stand_in
from dbconvert.engine.requests import refuse, refuse_full_table, refuse_stand_ins
from dbconvert.engine.split import split
from dbconvert.engine.stores import Store
from dbconvert.errors import UsageError
from dbconvert.events import Note, Reporter
from dbconvert.overrides import keys, parse_overrides
from dbconvert.plan import NoiseFit, Plan
from dbconvert.recipe import Recipe, read_recipe
from dbconvert.shipped import shipped
from dbconvert.tasks.base import Task
from dbconvert.tasks.registry import choose_task, named, reasons

PATHS = (("source",), ("package",), ("weights",), ("data", "source"), ("data", "tokenizer"))
CACHE = ("data", "cache")
JUDGES = ("features", "teacher", "mauve")
"""Networks that samples are judged by."""
LATENTS = ("data", "latents", "cache")
PACKAGE = "package"


@dataclass(frozen=True)
class Origin:
    """A recipe and where it was read from."""

    recipe: Recipe
    path: Path
    name: str


@dataclass
class Prepared:
    """A job, and what it was made from.

    Args:
        before: SHA-256 of the weights of earlier blocks, see `RunInfo`.
    """

    job: Job
    package: Package
    plan: Plan
    noise: NoiseFit
    tokenizer: Tokenizer | None
    before: dict[str, str]


def prepare(
    origin: Origin,
    folder: Path,
    block: int | None,
    report: Reporter,
    *,
    store: Store | None = None,
    keep_noise: bool = False,
    rehearsal: bool = False,
) -> Prepared:
    """Everything a loop needs.

    Args:
        folder: of the run; a package that the recipe does not name is made in it.
        store: where blocks lie that do not train; None keeps all of them on the device.
        keep_noise: leave a fit made here in the package, for the jobs of other blocks.
        rehearsal: nothing will be trained, so that data may be missing.

    Raises:
        UsageError: the recipe does not say enough, or asks for what cannot be.
        DBConvertError: the package or the data cannot be read.
    """
    recipe = origin.recipe
    package = get_package(recipe, folder, report)
    plan = settle_task(package.plan, recipe)
    recipe = with_own_z(recipe, named(str(plan.task)))
    refuse(plan, recipe, block)
    missing = rehearsal and unread(recipe)
    tokenizer = None if missing else find_tokenizer(recipe.data, plan, package.folder / MODEL)
    data = recipe.data
    examples = (
        stand_in(recipe, plan) if missing else open_examples(data, data.train, plan, tokenizer, report, training=True)
    )
    refuse_full_table(plan, recipe, examples)
    steps = steps_of(recipe, len(examples))
    mover = None if store is None else make_mover(package, plan, recipe, store)
    finished = find(plan, recipe, block, package.folder)
    recipe = replace(recipe, train=replace(recipe.train, after=tuple(str(run.folder) for run in finished)))
    before = told_of(finished, folder)
    network = build_network(package, plan, recipe, block, finished) if mover is None else mover.network
    network.task.kernel = recipe.train.attention
    if recipe.train.checkpointing:
        network.run.checkpointed = range(plan.anatomy.depth)
    network.run.remakes = recipe.train.recompute_modulation
    noise = get_noise(package, network, None if missing else examples, keep=keep_noise)
    refuse_other_noise(finished, noise)
    for run in finished:
        report(Note(f"after {run.folder}"))
    tell(report, plan, noise, recipe)
    held_out = None if rehearsal else data.validation
    validation = None if held_out is None else open_examples(data, held_out, plan, tokenizer, report)
    job = make_job(METHODS[recipe.train.method], network, noise, recipe, steps, examples, validation, folder, block)
    job.mover = mover
    return Prepared(job, package, plan, noise, tokenizer, before)


def unread(recipe: Recipe) -> bool:
    """Whether a rehearsal reads no data: there is none, or it would have to be encoded first."""
    return recipe.data.source is None or recipe.data.latents is not None


def tell(report: Reporter, plan: Plan, noise: NoiseFit, recipe: Recipe) -> None:
    """What the user should know before the first update."""
    if recipe.train.method != "blocks":
        return
    if plan.pretrained:
        report(Note("the source was pretrained: pure block-wise training makes it forget", warning=True))
    shares = ", ".join(f"{100 * noise.intervals().share(b):.1f} %" for b in range(len(plan.blocks)))
    if plan.noise.refit:
        when = " and ".join(f"{100 * share:g} %" for share in plan.noise.refit)
        report(Note(f"noise is fitted again after {when} of the updates"))
    if plan.context != "raw" or recipe.train.z != "noised":
        told = f"context {plan.context}, z {recipe.train.z}"
        report(Note(f"{told}: before an update of a block those before it run forward, without gradient"))
    kind = "label entropy" if noise.rule == "auto" else "noise mass"
    report(Note(f"noise {noise.rule} ({noise.basis}): blocks hold {shares} of the {kind}"))


# -- the recipe -------------------------------------------------------------------------------------------------


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
    def base(key: tuple[str, ...]) -> Path:
        return Path.cwd() if key in on_command_line else folder

    source, package, weights, data, tokenizer = (settled(lookup(recipe, key), base(key)) for key in PATHS)
    cache = recipe.data.cache and str((base(CACHE) / recipe.data.cache).resolve())  # need not exist yet
    latents = recipe.data.latents and with_paths(recipe.data.latents, base(("data", "latents", "vae")), base(LATENTS))
    read = replace(recipe.data, source=data, tokenizer=tokenizer, cache=cache, latents=latents)
    judges: dict[str, Any] = {name: settled(getattr(recipe.eval, name), base(("eval", name))) for name in JUDGES}
    told = replace(recipe.eval, **judges)
    after = tuple(str(settled(run, base(("train", "after")))) for run in recipe.train.after)
    states = recipe.train.states and str((base(("train", "states")) / recipe.train.states).resolve())
    train = replace(recipe.train, after=after, states=states)
    return replace(recipe, source=source, package=package, weights=weights, data=read, train=train, eval=told)


def with_paths(latents: LatentOptions, vae: Path, cache: Path) -> LatentOptions:
    kept = latents.cache and str((cache / latents.cache).resolve())
    return replace(latents, vae=str(settled(latents.vae, vae)), cache=kept)


def lookup(recipe: Recipe, key: tuple[str, ...]) -> str | None:
    value: Any = recipe
    for part in key:
        value = getattr(value, part)
    return None if value is None else str(value)


# -- the package and the task -----------------------------------------------------------------------------------


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
    refuse_misfit(plan.noise, chosen)
    if chosen.tried:
        raise UsageError(f"task {chosen.name} has to try the network", hint=f"split again with --task {chosen.name}")
    target = chosen.place(chosen.decide(plan.anatomy), plan.anatomy, None, None, None)
    return replace(plan, task=chosen.name, target=target)


def with_own_z(recipe: Recipe, task: type[Task]) -> Recipe:
    """The recipe with the task's own noisy targets where it leaves them open."""
    return replace(recipe, train=replace(recipe.train, z=recipe.train.z or task.zs[0]))


# -- data, network, noise ---------------------------------------------------------------------------------------


def build_network(
    package: Package, plan: Plan, recipe: Recipe, block: int | None, finished: list[FinishedRun]
) -> BlockwiseNetwork:
    """The network with the package's weights: whole, or one block with nothing of the others in memory, but for those
    before it that are finished and that it has to be told of."""
    if block is not None and finished:
        tensors = {k: v for b in range(block + 1) for k, v in package.tensors(block=b).items()}
        network = single_block(plan, package.source(), block, tensors, first=0)
        network.load({**network.tensors(), **tensors_of(finished)}, where="the runs of the blocks before")
        return network
    if block is not None:
        return single_block(plan, package.source(), block, package.tensors(block=block))
    network = whole_network(plan, package.source())
    tensors = package.tensors()
    if package.plan.task is None:
        tensors = {**network.tensors(), **tensors}  # the task came later: its own parameters are fresh
    network.load(tensors, where=str(package.folder))
    if METHODS[recipe.train.method].apart(recipe):
        refuse_stand_ins(plan, network, recipe)
        network.give_own_periphery()
    return network


def make_mover(package: Package, plan: Plan, recipe: Recipe, store: Store) -> Mover:
    """The network with the package's weights, whose blocks lie in a store."""
    network, own = hollow_network(plan, package.source()), METHODS[recipe.train.method].apart(recipe)
    if own:
        refuse_stand_ins(plan, network, recipe)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16-true" else torch.float32
    moved = [tensor.numel() for block in network.present for tensor in network.block_tensors(block).values()]
    if own:
        templates = [tensor.numel() for key, tensor in network.periphery_tensors().items() if network.is_template(key)]
        moved += templates * len(network.present)
    word, name = dtype.itemsize, recipe.optimizer.name
    store.refuse_full(sum(word * elements + state_size(elements, name, word) for elements in moved))
    homes = fill_blocks(network, lambda block: package.tensors(block=block), store, own=own, dtype=dtype)
    return Mover(network, homes, store, recipe.train.prefetch)


def get_noise(package: Package, network: BlockwiseNetwork, examples: Data | None, *, keep: bool) -> NoiseFit:
    """The package's noise fit, or one made now from the target table and the label frequencies.

    Args:
        examples: None leaves it at the split's preview.
        keep: write a new fit into the package, for the jobs of other blocks.
    """
    fit = package.noise
    if fit is None:
        fit = network.plan.preview if examples is None else fit_now(network, examples)
        if keep:
            package.keep_noise(fit)
    network.sigma_data = fit.sigma_data
    return fit


def fit_now(network: BlockwiseNetwork, examples: Data) -> NoiseFit:
    plan = network.plan
    table = network.task.table(network.model).detach().cpu()
    basis = "the label frequencies of the training data and the initial target table"
    return fit_noise(plan.noise, len(plan.blocks), table, examples.label_counts(), basis)


def steps_of(recipe: Recipe, examples: int) -> int:
    """Updates a block."""
    train = recipe.train
    if train.steps is not None:
        return train.steps
    if train.epochs is None:
        raise UsageError("how long to train?", hint="set train.steps or train.epochs")
    return train.epochs * epoch_of(recipe, examples)


def epoch_of(recipe: Recipe, examples: int) -> int:
    """Updates in which all examples are read once."""
    return max(1, examples // min(recipe.train.batch, examples))
