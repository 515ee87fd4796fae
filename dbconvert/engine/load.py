"""load: a checkpoint or a run back into a network that runs block by block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dbconvert.checkpoint import INDEX_SUFFIX, load_checkpoint, locate_checkpoint
from dbconvert.data.images import entering
from dbconvert.data.tokenizer_opening import from_description
from dbconvert.data.tokenizers import Description, Tokenizer
from dbconvert.data_options import DataOptions
from dbconvert.diffusion.intervals import Intervals
from dbconvert.engine import kept_tokenizer
from dbconvert.engine.assemble import CHECKPOINT, DATA_KEY, DROPOUT_KEY, source_folder
from dbconvert.engine.convert import single_block, whole_network, with_own_peripheries
from dbconvert.engine.infer import Begin, ends, sample
from dbconvert.engine.methods import METHODS
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.package import (
    MODEL,
    NOISE,
    NOISE_KEY,
    PERIPHERY,
    PLAN,
    PLAN_KEY,
    RECIPE,
    WEIGHTS,
    block_file,
    read_noise,
)
from dbconvert.engine.runs import RUN, RunInfo, read_info
from dbconvert.engine.train import NETWORK_FILE
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.files import inside
from dbconvert.plan import NoiseFit, Plan, parse_plan, read_plan
from dbconvert.recipe import Recipe, read_recipe
from dbconvert.schema import parse, read_json
from dbconvert.sources.base import Source
from dbconvert.sources.resolve import HUB_ID, has_code, reopen_source
from dbconvert.sources.transformers_files import COMPANIONS, CONFIG, SAFETENSORS, fetch
from dbconvert.tasks.base import Inputs

SAMPLE = "dbconvert sample, or dbconvert.engine.sample.draw"
EVERYTHING = (CONFIG, "*.py", "model.source/*", *COMPANIONS, *SAFETENSORS)


@dataclass(frozen=True)
class Loaded:
    """A trained network, ready to predict.

    Calling it samples from z = 0 and returns the network's output, e.g. logits [N, K]. Every evaluation runs one
    block.

    Args:
        data: what its training data looked like; pictures are normalised accordingly.
        layers: for a baseline, the layers that run; None for blocks.
        described: its tokenizer, for networks of text.
        places: where the tokenizer's files may lie.
        label_dropout: with which it was trained.
        longest: tokens that the network's positions reach; None where its source does not tell.
    """

    network: BlockwiseNetwork
    noise: NoiseFit
    data: DataOptions
    layers: range | None = None
    described: Description | None = None
    places: tuple[Path, ...] = ()
    longest: int | None = None
    label_dropout: float = 0.0

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """What it was trained with.

        Raises:
            DBConvertError: its files are missing, or another's are there.
        """
        there = [place for place in self.places if place.is_dir()]
        return None if self.described is None else from_description(self.described, there)

    @property
    def intervals(self) -> Intervals:
        return self.noise.intervals()

    @torch.no_grad()
    def __call__(
        self, inputs: Tensor | Mapping[str, Tensor], *, steps: int | None = None, begin: Begin = "zero"
    ) -> Tensor:
        """The prediction for a batch.

        Args:
            inputs: the network's first argument, or its arguments by name; pictures in [0, 1].
            steps: network evaluations, B + 1 by default.
            begin: from z = 0, or from a draw of noise.
        """
        if self.network.decided_task is not None and self.network.decided_task.generative:
            raise UsageError("the network draws images and predicts nothing of those it is given", hint=SAMPLE)
        name = self.network.plan.anatomy.inputs[0].name
        named = dict(inputs) if isinstance(inputs, Mapping) else {name: inputs}
        ready = {k: entering(v, self.data.image) for k, v in named.items()}
        return self.predict(ready, steps=steps, begin=begin)

    @torch.no_grad()
    def predict(self, inputs: Inputs, *, steps: int | None = None, begin: Begin = "zero") -> Tensor:
        """The same for arguments by name, with pictures as they were in training."""
        if self.layers is not None:
            return self.network.plain(inputs, self.layers)
        return ends(sample(self.network, self.intervals, inputs, steps=steps, begin=begin))[1]


def load(path: str | Path, source: str | Path | None = None, *, trust: bool = False) -> Loaded:
    """Rebuilds a trained network.

    Args:
        path: a checkpoint that `assemble` wrote (a file, the index of its shards, a folder or a hub id), or a run.
        source: the network's Python file, or its folder, where it does not lie beside the checkpoint. Code is only
            run from a file whose content matches the plan; nothing in the metadata is executed.
        trust: run the code that a hub repository brings along.

    Raises:
        UsageError: `path` is none of these.
        DBConvertError: it is damaged, cannot be fetched, or the source is missing or changed.
    """
    extra = [] if source is None else [Path(source) if Path(source).is_dir() else Path(source).parent]
    file = Path(path).suffix == Path(CHECKPOINT).suffix
    if not file and not Path(path).exists() and not index_of(Path(path)).exists() and HUB_ID.match(str(path)):
        folder = fetch(str(path), EVERYTHING)
        loaded = load_file(checkpoint_in(folder), extra, code=trust or source is not None)
    elif (Path(path) / RUN).is_file():
        loaded = load_run(Path(path), extra)
    else:
        loaded = load_file(checkpoint_in(Path(path)) if Path(path).is_dir() else Path(path), extra)
    loaded.network.eval()
    return loaded


def index_of(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)


def checkpoint_in(folder: Path) -> Path:
    for path in (folder / CHECKPOINT, index_of(folder / CHECKPOINT)):
        if path.exists():
            return inside(folder, path.name)
    raise UsageError(f"{folder} is neither a checkpoint nor a run")


def load_file(path: Path, extra: list[Path], *, code: bool = True) -> Loaded:
    """A checkpoint file or index.

    Args:
        code: whether Python files that lie with it may be run.
    """
    if not path.is_file() and index_of(path).is_file():
        path = index_of(path)
    metadata = locate_checkpoint(path)[1]
    if PLAN_KEY not in metadata:
        raise UsageError(f"{path} carries no plan", hint="give a checkpoint that dbconvert assemble wrote, or a run")
    plan = parse_plan(read_metadata_json(metadata, PLAN_KEY, path), file=f"the plan in {path}")
    if has_code(plan.source) and not code:
        raise DBConvertError(
            "the network is built by Python files of the repository, which are not run unasked",
            where=", ".join(plan.source.files),
            hint="read them, then load with trust=True; or give your own copy with source=PATH",
        )
    noise = parse(NoiseFit, read_metadata_json(metadata, NOISE_KEY, path), file=f"the noise in {path}")
    data = parse(DataOptions, read_metadata_json(metadata, DATA_KEY, path), file=f"the data options in {path}")
    folders = [*extra, source_folder(path), path.parent / MODEL, path.parent]
    source = reopen_source(plan.source, folders)
    network = filled(plan, source, noise, load_checkpoint(path)[0], path)
    told = read_metadata_json(metadata, kept_tokenizer.KEY, path) if kept_tokenizer.KEY in metadata else None
    described = None if told is None else parse(Description, told, file=f"the tokenizer in {path}")
    places = (kept_tokenizer.beside(path), *folders)
    dropped = read_metadata_json(metadata, DROPOUT_KEY, path) if DROPOUT_KEY in metadata else 0.0
    dropout = parse(float, dropped, file=f"the share of dropped labels in {path}")
    return Loaded(network, noise, data, None, described, places, source.longest(), dropout)


def read_metadata_json(metadata: Mapping[str, str], key: str, path: Path) -> object:
    try:
        return json.loads(metadata[key])
    except (KeyError, json.JSONDecodeError):
        raise DBConvertError(f"the metadata {key} of {path} is missing or damaged", hint="assemble it again") from None


def load_run(folder: Path, extra: list[Path]) -> Loaded:
    info, recipe, plan, noise = read_run(folder)
    source = reopen_source(plan.source, [*extra, Path(info.package) / MODEL])
    used = folder / kept_tokenizer.FILE
    described = parse(Description, read_json(used), file=str(used)) if used.is_file() else None
    places, dropout = (folder / kept_tokenizer.FOLDER,), recipe.train.label_dropout
    method = METHODS[info.method]
    if not method.blocks:
        tensors, _ = load_checkpoint(folder / WEIGHTS / NETWORK_FILE)
        network = filled(plan, source, noise, tensors, folder)
        method.settle(network, recipe)
        return Loaded(network, noise, recipe.data, method.layers(plan), described, places, source.longest(), dropout)
    tensors = {}
    for name in [*map(block_file, info.blocks), PERIPHERY]:
        tensors.update(load_checkpoint(folder / WEIGHTS / name)[0])
    if len(info.blocks) < len(plan.blocks):
        network = lone_block(plan, source, info.blocks[0], noise, tensors)
    else:
        network = filled(plan, source, noise, tensors, folder)
    return Loaded(network, noise, recipe.data, None, described, places, source.longest(), dropout)


def read_run(folder: Path) -> tuple[RunInfo, Recipe, Plan, NoiseFit]:
    info = read_info(folder)
    if info.status != "complete":
        raise DBConvertError(f"{folder} is not complete", hint=f"dbconvert train {info.origin} --resume -o {folder}")
    noise = read_noise(folder / NOISE)
    if noise is None:
        raise DBConvertError(f"{folder / NOISE} is missing")
    return info, read_recipe(folder / RECIPE), read_plan(folder / PLAN), noise


def filled(plan: Plan, source: Source, noise: NoiseFit, tensors: dict[str, Tensor], path: Path) -> BlockwiseNetwork:
    network = whole_network(plan, source)
    if with_own_peripheries(tensors):
        network.give_own_periphery()
    network.load(tensors, where=str(path))
    network.sigma_data = noise.sigma_data
    return network


def lone_block(plan: Plan, source: Source, block: int, noise: NoiseFit, tensors: dict[str, Tensor]) -> BlockwiseNetwork:
    """A single block's network, its own stem and readout in the network's places."""
    prefix = f"dbconvert.periphery.{block}."
    named = {k.removeprefix(prefix).replace("/", ".") if k.startswith(prefix) else k: v for k, v in tensors.items()}
    network = single_block(plan, source, block, named)
    network.sigma_data = noise.sigma_data
    return network
