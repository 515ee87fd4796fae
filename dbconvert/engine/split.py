"""split: from a source to a package."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy
from dbconvert.checkpoint import atomic_folder, load_weights, refuse_occupied, save_tensors
from dbconvert.conditioning.modulation import Start, condition_width
from dbconvert.data.datasets import open_part
from dbconvert.data.examples import Examples
from dbconvert.engine.convert import converted
from dbconvert.engine.network import BlockwiseNetwork, check_keys
from dbconvert.engine.noise import UNIFORM, edm_noise, fit_noise
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
from dbconvert.engine.picture import draw_noise
from dbconvert.errors import Refused, UsageError
from dbconvert.events import Note, Reporter, Stage, silent
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import site_features
from dbconvert.graph.proof import prove
from dbconvert.plan import SCHEMA_VERSION, NoiseFit, Plan, cut
from dbconvert.recipe import DataOptions, NoiseOptions, SplitOptions
from dbconvert.schema import to_json
from dbconvert.sources.base import Source
from dbconvert.sources.resolve import open_source
from dbconvert.tasks.base import Task
from dbconvert.tasks.registry import choose_task, reasons

LIBRARIES = ("dbconvert", "torch", "transformers", "accelerate", "safetensors")


@dataclass(frozen=True)
class SplitResult:
    """A plan, the noise as far as it is known, and the package; None after a dry run."""

    plan: Plan
    noise: NoiseFit
    package: Path | None
    warnings: tuple[str, ...]


@dataclass
class Opened:
    """A network with what the analysis says of it."""

    source: Source
    model: nn.Module
    inputs: dict[str, Any]
    weights: str
    pretrained: bool
    anatomy: Anatomy


def inspect(
    source: str,
    *,
    stack: str | None = None,
    weights: str | None = None,
    seed: int = 0,
    report: Reporter = silent,
) -> Anatomy:
    """What the analysis sees of a network, proved by numbers.

    Args:
        source: `model.py`, `model.py:name`, a folder with a Transformers config.json, or a hub id.
        stack: path of the layers' container, when there are several.
        weights: a file of trained weights.
        seed: of the random initialisation where there are none.

    Raises:
        Refused: the network cannot be converted; the error names the node and the reason.
        DBConvertError: the source cannot be opened.
    """
    return open_and_analyse(source, stack=stack, weights=weights, seed=seed, report=report).anatomy


def open_and_analyse(source: str, *, stack: str | None, weights: str | None, seed: int, report: Reporter) -> Opened:
    report(Stage("reading the source"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        opened = open_source(source)
        model = opened.build()
    origin = fill_weights(opened, model, weights)
    inputs = opened.example_inputs(model)
    report(Stage("analysing the graph"))
    anatomy = analyse(model, inputs, stack=stack)
    report(Stage("proving by numbers"))
    anatomy = prove(model, anatomy, inputs)
    return Opened(opened, model, inputs, origin or f"random, seed {seed}", origin is not None, anatomy)


def fill_weights(source: Source, model: nn.Module, weights: str | None) -> str | None:
    """Trained weights from the file given, else from the source itself; returns where they came from."""
    if weights is None:
        return source.load_weights(model)
    given = load_weights(Path(weights))
    own = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in own.items():
        first.setdefault(id(tensor), name)
    needed = {name: tensor for name, tensor in own.items() if name in given or first[id(tensor)] == name}
    check_keys(given, needed, weights)
    model.load_state_dict(given, strict=False)
    return weights


def split(
    source: str,
    *,
    out: str | None = None,
    options: SplitOptions = SplitOptions(),
    noise: NoiseOptions = NoiseOptions(),
    task: str | None = None,
    data: DataOptions | None = None,
    weights: str | None = None,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
    base: Path = Path(),
    report: Reporter = silent,
) -> SplitResult:
    """Cuts a network into blocks and writes a package that trains.

    Args:
        source: see `inspect`.
        out: the package's folder; `<name>-db<B>` in the working directory by default.
        data: where examples come from, which lets `auto` noise be fitted now.
        force: replace a package that is already there.
        dry_run: decide and return, write nothing.
        base: folder that relative data paths start from.

    Raises:
        Refused, UsageError, DBConvertError: nothing is written then.
    """
    if out is not None and not dry_run:
        refuse_occupied(Path(out), force=force)
    opened = open_and_analyse(source, stack=options.stack, weights=weights, seed=seed, report=report)
    anatomy = opened.anatomy
    blocks = decide_blocks(anatomy, options)
    chosen = choose_task(anatomy, task)
    plan, fit = decide(opened, options, noise, chosen, blocks)
    network = convert_whole(opened, plan, chosen, seed)
    if data is not None and data.source is not None and plan.task is not None:
        fit = fit_to_data(network, data, base)
    plan = replace(plan, preview=fit, shapes={k: tuple(v.shape) for k, v in network.tensors().items()})
    warnings = tuple(cautions(plan))
    for warning in warnings:
        report(Note(warning, warning=True))
    if dry_run:
        return SplitResult(plan, fit, None, warnings)
    folder = Path(out) if out is not None else default_folder(source, len(blocks))
    report(Stage("writing the package"))
    plan = write_package(folder, plan, fit, opened, network, data, force=force)
    return SplitResult(plan, fit, folder, warnings)


# -- decisions ------------------------------------------------------------------------------------------------


def decide_blocks(anatomy: Anatomy, options: SplitOptions) -> tuple[tuple[int, int], ...]:
    given = [o for o in (options.blocks, options.layers, options.layers_per_block) if o is not None]
    if len(given) > 1 and not (options.blocks and options.layers and len(options.layers) == options.blocks):
        raise UsageError("blocks, layers and layers-per-block say the same thing twice", hint="give one of them")
    if options.layers_per_block is not None:
        whole, rest = divmod(anatomy.depth, options.layers_per_block)
        sizes = (options.layers_per_block,) * whole + (rest,) * bool(rest)
        blocks = cut(anatomy.depth, sizes=sizes)
    else:
        blocks = cut(anatomy.depth, blocks=options.blocks or 3, sizes=options.layers)
    refuse_uncuttable(anatomy, blocks)
    return blocks


def refuse_uncuttable(anatomy: Anatomy, blocks: tuple[tuple[int, int], ...]) -> None:
    """Weights that two blocks would share tie them together."""
    if anatomy.calls > 1:
        raise Refused(
            f"each layer is called {anatomy.calls} times with the same weights, so its calls cannot be told apart",
            node=anatomy.stack,
            kind="looped",
            hint="training of looped stacks is not supported yet",
        )
    for group in anatomy.tied:
        homes = {anatomy.layer_of(name) for name in group}
        if len(homes) > 1 and homes != {None}:
            raise Refused(
                "a weight belongs to more than one layer, or to a layer and its surroundings",
                node=", ".join(group),
                kind="tied-layers",
                hint="give each its own weight",
            )


def decide(
    opened: Opened,
    options: SplitOptions,
    noise: NoiseOptions,
    task: type[Task] | None,
    blocks: tuple[tuple[int, int], ...],
) -> tuple[Plan, NoiseFit]:
    anatomy = opened.anatomy
    target = task.decide(anatomy) if task is not None else None
    rule = noise.resolve(noise.rule or (task.rule if task is not None else "edm"))
    if rule.rule == "auto" and target is not None:
        table = torch.nn.functional.normalize(
            torch.randn(target.classes, target.width, generator=torch.Generator().manual_seed(0)), dim=-1
        )
        fit = fit_noise(rule, len(blocks), table, None, UNIFORM)
    elif rule.rule == "auto":
        raise UsageError(
            "noise `auto` is fitted to a task's targets, and no task was decided",
            why=reasons(anatomy),
            hint="name one with --task, or use --noise edm",
        )
    else:
        fit = edm_noise(rule, len(blocks))
    plan = Plan(
        schema_version=SCHEMA_VERSION,
        versions={**{name: version(name) for name in LIBRARIES}, "python": platform.python_version()},
        source=opened.source.ref,
        anatomy=anatomy,
        blocks=blocks,
        start=decide_start(opened, options.start),
        condition_width=options.condition_width or default_width(anatomy),
        task=task.name if task is not None else None,
        target=target,
        noise=rule,
        preview=fit,
        weights=opened.weights,
        pretrained=opened.pretrained,
        files={},
        shapes={},
    )
    return plan, fit


def decide_start(opened: Opened, wanted: Start | None) -> Start:
    if wanted is not None:
        return wanted
    return "original" if opened.pretrained or opened.anatomy.post_norm else "zero"


def default_width(anatomy: Anatomy) -> int:
    widths = []
    for layer in anatomy.layers:
        norms, gates = site_features(layer)
        widths.append(condition_width(layer.parameters, 2 * sum(norms) + sum(gates)))
    return min(widths)


def cautions(plan: Plan) -> list[str]:
    """What the user should know before training."""
    found = []
    if plan.task is None:
        found.append(f"no single task fits this network ({reasons(plan.anatomy)}): set `task` in the recipe")
    if plan.pretrained:
        found.append(
            "pure block-wise training makes a pretrained network forget: "
            "its ordinary loss gets worse (Qwen2.5-0.5B: 2.11 to 4.69 in 100 steps)"
        )
    if plan.anatomy.verdict == "restricted":
        found.append(f"only {plan.anatomy.stack} is cut; the rest belongs to the periphery, which every block trains")
    return found


# -- conversion and writing -------------------------------------------------------------------------------------


def convert_whole(opened: Opened, plan: Plan, task: type[Task] | None, seed: int) -> BlockwiseNetwork:
    """Injects the plan into the network, with the task's own parameters where a task was decided."""
    acting = task(plan.anatomy, plan.target) if task is not None and plan.target is not None else None
    run = converted(opened.model, plan, acting, seed=seed)
    return BlockwiseNetwork(opened.model, run, acting, plan, tuple(range(len(plan.blocks))), "shared")


def fit_to_data(network: BlockwiseNetwork, data: DataOptions, base: Path) -> NoiseFit:
    plan = network.plan
    if plan.noise.rule == "edm":
        return plan.preview
    target = plan.target
    assert target is not None
    examples = Examples(open_part(data, data.train, base), data, plan.anatomy, target.classes)
    table = network.task.table(network.conditioning).detach()
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
) -> Plan:
    with atomic_folder(folder, force=force) as temporary:
        opened.source.copy_to(temporary / MODEL)
        files = {}
        for name, tensors in parts(network).items():
            files[name] = save_tensors(temporary / WEIGHTS / name, tensors)
        plan = replace(plan, files=files)
        (temporary / PLAN).write_text(to_json(plan), encoding="utf-8")
        if fit.basis != UNIFORM:
            (temporary / NOISE).write_text(to_json(fit), encoding="utf-8")
        (temporary / RECIPE).write_text(package_recipe(plan, data), encoding="utf-8")
        (temporary / README).write_text(package_readme(plan, fit), encoding="utf-8")
        (temporary / TRAIN).write_text(train_script(), encoding="utf-8")
        draw_noise(fit, temporary / PICTURE)
    return plan


def parts(network: BlockwiseNetwork) -> dict[str, dict[str, Tensor]]:
    """The weights by file: one a block, one for the periphery."""
    return {
        **{block_file(b): network.block_tensors(b) for b in network.present},
        PERIPHERY: network.periphery_tensors(),
    }


def default_folder(source: str, blocks: int) -> Path:
    stem = Path(source.partition(".py:")[0]).stem if ".py" in source else Path(source).name
    return Path(f"{stem}-db{blocks}")
