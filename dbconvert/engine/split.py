"""split: from a source to a package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dbconvert.data_options import DataOptions
from dbconvert.engine.convert import begin_conditioning, converted
from dbconvert.engine.decide import cautions, decide, decide_blocks, decide_context
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.noise import UNIFORM, fit_noise
from dbconvert.engine.opening import Opened, materialised, open_and_analyse
from dbconvert.engine.package import (
    MODEL,
    NOISE,
    PERIPHERY,
    PICTURE,
    PLAN,
    README,
    RECIPE,
    TRAIN,
    WEIGHTS,
    block_file,
)
from dbconvert.engine.package_texts import package_readme, package_recipe, train_script
from dbconvert.engine.paths import settled
from dbconvert.engine.picture import draw_noise
from dbconvert.engine.reading import find_tokenizer, open_examples
from dbconvert.engine.trained import Fitted
from dbconvert.events import Note, Reporter, Stage, silent
from dbconvert.files import atomic_folder, quick_digest, refuse_occupied
from dbconvert.graph.inject import PREFIX
from dbconvert.plan import NoiseFit, NoiseRule, Plan
from dbconvert.recipe import SplitOptions
from dbconvert.schema import to_json
from dbconvert.stream import Item, write_items
from dbconvert.tasks.base import Task
from dbconvert.tasks.registry import choose_task


@dataclass(frozen=True)
class SplitResult:
    """A plan, the noise as far as it is known, and the package; None after a dry run."""

    plan: Plan
    noise: NoiseFit
    package: Path | None
    warnings: tuple[str, ...]


def split(
    source: str,
    *,
    out: str | None = None,
    options: SplitOptions = SplitOptions(),
    noise: NoiseRule = NoiseRule(),
    task: str | None = None,
    data: DataOptions | None = None,
    weights: str | None = None,
    seed: int = 0,
    trust: bool = False,
    drop_extra: bool = False,
    force: bool = False,
    dry_run: bool = False,
    prove: bool = False,
    report: Reporter = silent,
) -> SplitResult:
    """Cuts a network into blocks and writes a package that trains.

    Args:
        source: see `inspect`.
        out: the package's folder; `<name>-db<B>` in the working directory by default.
        data: where examples come from, which lets `auto` noise be fitted now.
        trust: run the code that a Transformers folder or repository brings along.
        drop_extra: leave out stored tensors that the network does not have.
        force: replace a package that is already there.
        dry_run: decide and return, write nothing.
        prove: prove a large network on its own weights, not on a small twin.

    Raises:
        Refused, UsageError, DBConvertError: nothing is written then.
    """
    if data is not None:
        data = replace(data, source=settled(data.source, Path()))
    if out is not None and not dry_run:
        refuse_occupied(Path(out), force=force)
    opened = open_and_analyse(
        source,
        stack=options.stack,
        weights=weights,
        seed=seed,
        trust=trust,
        drop_extra=drop_extra,
        whole=prove,
        report=report,
    )
    anatomy = opened.anatomy
    chosen = choose_task(anatomy, task)
    blocks = decide_blocks(anatomy, options, chosen)
    options = replace(options, context=decide_context(options, chosen, len(blocks), anatomy))
    plan, fit = decide(opened, options, noise, chosen, blocks)
    if opened.large and opened.trained is None and not dry_run:
        report(Stage("building the network"))
        opened = replace(opened, model=materialised(opened.source, opened.model, seed))
    empty = opened.large  # what a task adds is not
    network = convert_whole(opened, plan, chosen, seed)
    if empty and not dry_run:
        begin_conditioning(network, seed=seed)
    if data is not None and data.source is not None and plan.task is not None:
        fit = fit_to_data(network, data, opened)
    plan = replace(plan, preview=fit, shapes={k: tuple(v.shape) for k, v in network.tensors().items()})
    warnings = tuple(cautions(plan))
    for warning in warnings:
        report(Note(warning, warning=True))
    if dry_run:
        return SplitResult(plan, fit, None, warnings)
    folder = Path(out) if out is not None else default_folder(source, len(blocks))
    report(Stage("writing the package"))
    plan = write_package(folder, plan, fit, opened, network, data, force=force, report=report)
    return SplitResult(plan, fit, folder, warnings)


# -- conversion and writing -------------------------------------------------------------------------------------


def convert_whole(opened: Opened, plan: Plan, task: type[Task] | None, seed: int) -> BlockwiseNetwork:
    """Injects the plan into the network, with the task's own parameters where a task was decided."""
    acting = task(plan.anatomy, plan.target, plan.noise) if task is not None and plan.target is not None else None
    run = converted(opened.model, plan, acting, seed=seed)
    return BlockwiseNetwork(opened.model, run, acting, plan, tuple(range(len(plan.blocks))), "shared")


def fit_to_data(network: BlockwiseNetwork, data: DataOptions, opened: Opened) -> NoiseFit:
    plan = network.plan
    if plan.noise.rule != "auto":
        return plan.preview
    tokenizer = find_tokenizer(data, plan, opened.source.folder)
    examples = open_examples(data, data.train, plan, tokenizer)
    table = network.task.table(network.model).detach()
    basis = f"the label frequencies of {data.source} ({data.train}) and the initial target table"
    return fit_noise(plan.noise, len(plan.blocks), table, examples.label_counts(), basis)


def write_package(
    folder: Path,
    plan: Plan,
    fit: NoiseFit,
    opened: Opened,
    network: BlockwiseNetwork,
    data: DataOptions | None,
    *,
    force: bool,
    report: Reporter,
) -> Plan:
    with atomic_folder(folder, force=force) as temporary:
        opened.source.copy_to(temporary / MODEL)
        if fit.basis != UNIFORM:
            (temporary / NOISE).write_text(to_json(fit), encoding="utf-8")
        (temporary / RECIPE).write_text(package_recipe(plan, data), encoding="utf-8")
        (temporary / README).write_text(package_readme(plan, fit), encoding="utf-8")
        (temporary / TRAIN).write_text(train_script(), encoding="utf-8")
        draw_noise(fit, temporary / PICTURE)
        (temporary / WEIGHTS).mkdir()
        report(Stage("writing the weights"))
        files = {}
        for name, items in parts(network, opened.trained).items():
            write_items(temporary / WEIGHTS / name, items)
            files[name] = quick_digest(temporary / WEIGHTS / name)
        plan = replace(plan, files=files, keys="network" if opened.trained is None else "source")
        (temporary / PLAN).write_text(to_json(plan), encoding="utf-8")
    return plan


def parts(network: BlockwiseNetwork, trained: Fitted | None) -> dict[str, dict[str, Item]]:
    """The weights by file, one a block and one for the periphery: trained ones as they are stored, with what
    conversion adds beside them."""
    found: dict[str, dict[str, Item]] = {**{block_file(b): {} for b in network.present}, PERIPHERY: {}}

    def put(key: str, owner: int | None, item: Item) -> None:
        found[PERIPHERY if owner is None else block_file(owner)][key] = item

    for key, tensor in network.tensors().items():
        if trained is None or key in trained.absent or key.startswith(PREFIX + "."):
            put(key, network.owner(key), tensor)
    if trained is not None:
        for key, item in trained.items.items():
            put(key, network.owner(trained.homes[key]), item)
    return found


def default_folder(source: str, blocks: int) -> Path:
    stem = Path(source.partition(".py:")[0]).stem if ".py" in source else Path(source).name
    return Path(f"{stem}-db{blocks}")
