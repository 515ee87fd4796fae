"""assemble: from trained blocks to one checkpoint that carries its plan, or back to the original network."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from dbconvert.checkpoint import INDEX_SUFFIX, locate_checkpoint, read_metadata, save_checkpoint
from dbconvert.engine import kept_tokenizer
from dbconvert.engine.finished import check_shapes, merged, open_finished, refuse_mixture
from dbconvert.engine.original import open_untrained, original_items
from dbconvert.engine.package import MODEL, NOISE_KEY, PLAN_KEY, README, RECIPE
from dbconvert.engine.package_texts import checkpoint_readme
from dbconvert.engine.runs import newest_complete
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Note, Reporter, Stage, silent
from dbconvert.files import atomic_folder, refuse_occupied
from dbconvert.plan import Plan
from dbconvert.recipe import read_recipe
from dbconvert.schema import to_json
from dbconvert.sources.resolve import has_code, holds
from dbconvert.stream import Item

DATA_KEY = "dbconvert.data"
DROPOUT_KEY = "dbconvert.label_dropout"
SOURCE_SUFFIX = ".source"
CHECKPOINT = "model.safetensors"
SUFFIX = ".safetensors"
NOT_OURS = (".bin", ".pt", ".pth", ".ckpt", ".json", ".h5", ".gguf", ".onnx")
SHARD_BYTES = 5 * 10**9


def assemble(
    runs: Iterable[str] = (),
    *,
    out: str = CHECKPOINT,
    original: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    report: Reporter = silent,
) -> Path:
    """Puts trained blocks together into one safetensors checkpoint, or untrained ones into the original network.

    Tensors are copied from file to file and never become tensors in memory. The plan, the noise and what the data
    looked like travel in the checkpoint's metadata.

    Args:
        runs: one run of all blocks, or one run a block; the newest complete run of all blocks by default. With
            `original`, the package.
        out: a file `*.safetensors`, or a folder: the checkpoint with its configuration, tokenizer and the like.
        original: write the network as it was before conversion.
        force: replace what is there, if dbconvert wrote it.
        shard_bytes: larger checkpoints become shards and an index.

    Returns:
        the file, the index of its shards, or the folder.

    Raises:
        UsageError: `out` exists already.
        DBConvertError: blocks are missing, doubled or damaged, do not come from one split and one noise fit, or were
            trained and cannot be turned back.
    """
    path = Path(out)
    refuse_destination(path, force=force)
    report(Stage("checking the blocks"))
    if original:
        package = open_untrained(list(runs))
        plan, model = package.plan, package.folder / MODEL
        items, metadata, run = original_items(package), {}, None
    else:
        finished = [open_finished(Path(run)) for run in runs] or [open_finished(newest_complete())]
        refuse_mixture(finished)
        first = finished[0]
        report(Note(f"from {', '.join(str(run.folder) for run in finished)}"))
        stored = merged(finished)
        check_shapes(stored, first.plan, own=first.info.periphery == "frozen-target")
        items, plan, model = dict(stored), first.plan, Path(first.info.package) / MODEL
        recipe, run = read_recipe(first.folder / RECIPE), first.folder
        metadata = {PLAN_KEY: to_json(plan), NOISE_KEY: to_json(first.noise), DATA_KEY: to_json(recipe.data)}
        if recipe.train.label_dropout:
            metadata[DROPOUT_KEY] = str(recipe.train.label_dropout)
        metadata.update(kept_tokenizer.metadata_of(run))
    report(Stage("writing the checkpoint"))
    if path.suffix == SUFFIX:
        if run is not None:
            copy_source(model, path, plan, force=force)
            kept_tokenizer.copy_beside(run, path, force=force)
        return save_checkpoint(path, items, metadata, shard_bytes)
    return write_folder(path, items, metadata, plan, model, run, shard_bytes, force=force)


# -- where it goes ----------------------------------------------------------------------------------------------


def refuse_destination(path: Path, *, force: bool) -> None:
    """Raises UsageError where something is in the way."""
    if path.suffix in NOT_OURS:
        raise UsageError(f"{path} does not end in {SUFFIX}", hint=f"-o {CHECKPOINT}, or -o FOLDER")
    if path.suffix != SUFFIX:
        refuse_occupied(path, force=force)
        return
    for place in (path, path.with_name(path.name + INDEX_SUFFIX)):
        if place.exists() and not force:
            raise UsageError(f"{place} exists already", hint="give another -o, or --force to replace it")
        if place.exists() and PLAN_KEY not in metadata_of(place):
            raise UsageError(f"{place} was not written by dbconvert, so --force does not replace it")


def metadata_of(path: Path) -> Mapping[str, str]:
    return locate_checkpoint(path)[1] if path.name.endswith(INDEX_SUFFIX) else read_metadata(path)


def write_folder(
    folder: Path,
    items: Mapping[str, Item],
    metadata: Mapping[str, str],
    plan: Plan,
    model: Path,
    run: Path | None,
    shard_bytes: int,
    *,
    force: bool,
) -> Path:
    """The checkpoint with everything that belongs to it, to be passed on."""
    if not model.is_dir():
        raise DBConvertError(
            f"{model} is missing, where the network's configuration and tokenizer are",
            hint=f"put the package back, or write -o {CHECKPOINT} alone",
        )
    with atomic_folder(folder, force=force) as temporary:
        if plan.source.kind != "model_file":
            shutil.copytree(model, temporary, dirs_exist_ok=True)
        elif metadata:
            shutil.copytree(model, source_folder(temporary / CHECKPOINT))
        if run is not None:
            kept_tokenizer.copy_into(run, temporary)
        if metadata:
            (temporary / README).write_text(checkpoint_readme(plan), encoding="utf-8")
        save_checkpoint(temporary / CHECKPOINT, items, metadata, shard_bytes)
    return folder


def copy_source(model: Path, checkpoint: Path, plan: Plan, *, force: bool) -> None:
    """Python files lie beside the checkpoint; a Transformers configuration travels inside it."""
    folder = source_folder(checkpoint)
    if not has_code(plan.source) or not model.is_dir() or holds(folder, plan.source):
        return
    with atomic_folder(folder, force=force) as temporary:
        shutil.copytree(model, temporary, dirs_exist_ok=True)


def source_folder(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name.partition(SUFFIX)[0] + SOURCE_SUFFIX)
