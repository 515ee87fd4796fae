"""train: a recipe or a package in, a run out."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration

from dbconvert.checkpoint import save_tensors
from dbconvert.engine import kept_tokenizer
from dbconvert.engine.compiling import compile_layers, refuse_uncompiled
from dbconvert.engine.kept_states import keep_states
from dbconvert.engine.loop import Loop
from dbconvert.engine.memory import MemoryReport, measure
from dbconvert.engine.method import Job
from dbconvert.engine.methods import METHODS
from dbconvert.engine.metrics import Metrics
from dbconvert.engine.optimizers import refuse_unsupported
from dbconvert.engine.package import (
    NOISE,
    NOISE_KEY,
    PERIPHERY,
    PLAN,
    PLAN_KEY,
    RECIPE,
    WEIGHTS,
    block_file,
)
from dbconvert.engine.prepare import Origin, epoch_of, prepare, read_origin
from dbconvert.engine.ram import memory_errors
from dbconvert.engine.runs import (
    CHECKPOINTS,
    MEMORY,
    RUN,
    RunInfo,
    new_run_folder,
    newest_unfinished,
    read_info,
    start_run,
    write_info,
)
from dbconvert.engine.stores import Store, open_store
from dbconvert.errors import UsageError
from dbconvert.events import Reporter, silent
from dbconvert.files import sha256_file, write_text
from dbconvert.plan import NoiseFit, Plan
from dbconvert.recipe import Recipe
from dbconvert.schema import to_data, to_json, to_yaml

NETWORK_FILE = "network.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Args:
        folder: the run.
        metrics: of the last evaluation; empty without validation data.
        memory: what an update holds.
    """

    folder: Path
    metrics: Metrics
    memory: MemoryReport


def train(
    target: str,
    *,
    overrides: Iterable[str] = (),
    block: int | None = None,
    resume: bool = False,
    out: str | None = None,
    report: Reporter = silent,
) -> TrainResult:
    """Trains a converted network block by block.

    Args:
        target: a recipe file, a package folder, or the name of a shipped recipe.
        overrides: `key=value`, dotted keys.
        block: train this block alone, with nothing of the others in memory.
        resume: continue the newest unfinished run of the target (or the one named by `out`).
        out: the run's folder; runs/NAME-NNN by default.

    Raises:
        UsageError: something in the request is wrong.
        DBConvertError: training cannot go on; the last whole state stays on disk.
    """
    origin = read_origin(target, overrides)
    folder = choose_folder(origin, block, resume=resume, out=out)
    if resume:
        origin = resumed(origin, folder, overrides, block)
    recipe = origin.recipe
    accelerator = make_accelerator(recipe, folder)
    alone = [f"train.method={recipe.train.method}"] * METHODS[recipe.train.method].alone
    alone += [f"train.inactive={recipe.train.inactive}"] * (recipe.train.inactive != "resident")
    if alone and accelerator.num_processes > 1:
        raise UsageError(f"{alone[0]} runs in one process only", hint="start it without accelerate")
    refuse_unsupported(recipe, accelerator.device, accelerator.num_processes)
    if recipe.train.compile:
        refuse_uncompiled("train.compile", accelerator.device)
    report = report if accelerator.is_main_process else silent
    store = open_store(recipe.train.inactive, folder, accelerator.device)
    with memory_errors(str(folder)), store or nullcontext():
        return carry_out(origin, folder, block, accelerator, store, report)


def carry_out(
    origin: Origin, folder: Path, block: int | None, accelerator: Accelerator, store: Store | None, report: Reporter
) -> TrainResult:
    """Prepares, measures, trains and writes what was trained."""
    recipe = origin.recipe
    prepared = prepare(origin, folder, block, report, store=store, keep_noise=block is not None)
    job, package, noise = prepared.job, prepared.package, prepared.noise
    info = RunInfo(
        status="running",
        method=recipe.train.method,
        origin=str(origin.path.parent if origin.path.name == RECIPE else origin.path),
        package=str(package.folder.resolve()),
        split=package.plan.identity,
        noise=noise.identity,
        blocks=job.network.present if block is None else (block,),
        block=block,
        periphery=recipe.train.periphery,
        updates=sum(unit.total for unit in job.units.values()),
        epoch=epoch_of(recipe, len(job.examples)),
        before=prepared.before,
    )
    loop = Loop(job, accelerator, report)
    memory = measure(job, accelerator.device)
    if recipe.train.states is not None:
        with accelerator.main_process_first():
            keep_states(job, prepared.before, accelerator.autocast(), report)
    if recipe.train.compile:
        compile_layers(job.network)
    if accelerator.is_main_process:
        write_head(folder, info, job.recipe, prepared.plan, noise)
        write_text(folder / MEMORY, to_json(memory))
        kept_tokenizer.keep(prepared.tokenizer, folder)
    start_trackers(accelerator, recipe)
    metrics = loop.run()
    accelerator.end_training()
    if accelerator.is_main_process:
        finish(folder, replace(info, noise=job.noise.identity), job)
    if job.mover is not None:
        job.mover.end()
    return TrainResult(folder, metrics, memory)


def choose_folder(origin: Origin, block: int | None, *, resume: bool, out: str | None) -> Path:
    """Where the run lives.

    Raises:
        UsageError: `out` is occupied, or does not hold the run to resume.
    """
    if resume:
        return Path(out) if out is not None else run_to_resume(origin, block)
    if out is not None:
        if Path(out).exists():
            raise UsageError(f"{out} exists already", hint="give another -o, or --resume to continue that run")
        return Path(out)
    return new_run_folder(origin.name if block is None else f"{origin.name}-block{block}")


def run_to_resume(origin: Origin, block: int | None) -> Path:
    """The run that was named itself, or the newest unfinished one of the recipe or package that was."""
    folder = origin.path.parent
    if origin.path.name == RECIPE and (folder / RUN).is_file():
        return folder
    return newest_unfinished(folder if origin.path.name == RECIPE else origin.path, block)


def resumed(origin: Origin, folder: Path, overrides: Iterable[str], block: int | None) -> Origin:
    """The origin with the recipe that a run began with; overrides may change how it is logged, nothing else.

    Raises:
        UsageError: the run is complete, or something else is asked for than what it does.
    """
    info = read_info(folder)
    if info.status == "complete":
        raise UsageError(f"{folder} is complete", hint="there is nothing to resume")
    if info.block != block:
        own = "leave out --block" if info.block is None else f"add --block {info.block}"
        raise UsageError(f"{folder} does not train what is asked for", hint=own)
    began, now = read_origin(str(folder / RECIPE), ()).recipe, read_origin(str(folder / RECIPE), overrides).recipe
    before, after = to_data(began), to_data(now)
    changed = [key for key in after if before[key] != after[key] and key != "log"]
    if changed:
        raise UsageError(
            f"{folder} was started with another recipe: {', '.join(changed)} differ",
            hint="leave the overrides out: a run is continued with its own recipe",
        )
    began_at = Path(info.origin)
    return replace(origin, recipe=now, path=began_at / RECIPE if began_at.is_dir() else began_at)


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    return Accelerator(
        cpu=recipe.train.cpu,
        mixed_precision="no" if recipe.train.precision == "fp32" else "bf16",
        log_with=list(recipe.log.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
        # A block's update leaves the other blocks' parameters unused.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    for name in recipe.log.trackers:
        if name not in {tracker.value for tracker in accelerator.log_with}:
            raise UsageError(f"tracker {name} is not installed", hint=f"pip install 'dbconvert[{name}]'")
    if recipe.log.trackers:
        accelerator.init_trackers(recipe.log.project, config=flat(to_data(recipe)))


def flat(data: dict[str, object], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested options as `section.key`, in kinds that every tracker takes."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return found


def write_head(folder: Path, info: RunInfo, recipe: Recipe, plan: Plan, noise: NoiseFit) -> None:
    start_run(folder, info)
    write_text(folder / RECIPE, to_yaml(recipe))
    write_text(folder / PLAN, to_json(plan))
    write_text(folder / NOISE, to_json(noise))


def finish(folder: Path, info: RunInfo, job: Job) -> None:
    """Writes the trained weights, marks the run complete and removes the states."""

    network = job.network if job.mover is None else job.mover.at_rest().network
    job.method.finish(network)
    metadata = {PLAN_KEY: info.split, NOISE_KEY: info.noise or ""}
    parts = {NETWORK_FILE: network.tensors()}
    if job.layers is None:
        parts = {block_file(b): network.block_tensors(b) for b in info.blocks}
        parts[PERIPHERY] = network.periphery_tensors()
    files = {}
    for name, tensors in parts.items():
        save_tensors(folder / WEIGHTS / name, tensors, metadata)
        files[name] = sha256_file(folder / WEIGHTS / name)
    write_info(folder, replace(info, status="complete", files=files))
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
