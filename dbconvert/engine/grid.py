"""What a comparison runs: the grid of varied recipe keys, and the baselines, each of them once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dbconvert.engine.against import (
    AGAINST,
    ALWAYS,
    DEPTH,
    NOISE,
    ON_THE_WAY,
    ONE_BLOCK,
    SHALLOW,
    STAY,
    WATCHED,
    Baseline,
)
from dbconvert.engine.package import PLAN
from dbconvert.engine.prepare import read_origin, with_own_z
from dbconvert.engine.requests import refuse_unlabelled
from dbconvert.errors import UsageError
from dbconvert.files import quick_digest
from dbconvert.plan import read_plan
from dbconvert.recipe import Recipe
from dbconvert.schema import identity, record, to_data
from dbconvert.sources.python_files import named_neighbours, sha256_files
from dbconvert.tasks.registry import named

BLOCKS = "split.blocks"


@record
class Cell:
    """One training and its evaluation.

    Args:
        name: of its row; the same for all seeds.
        baseline: name of the baseline, None for a cell of the grid.
        varied: the varied keys that it depends on.
        part: of the data, on which it is evaluated.
        optional: where this machine, this network or what is installed does not allow it, it is no failure.
        identity: SHA-256 of its settled recipe, with what its files hold, of the part, and of the versions.
    """

    name: str
    baseline: str | None
    varied: dict[str, str]
    seed: int
    part: str
    identity: str
    optional: bool = False


@dataclass(frozen=True)
class Planned:
    """A cell, and the recipe that it trains."""

    cell: Cell
    recipe: Recipe


@dataclass(frozen=True)
class Request:
    """What a comparison is asked for.

    Args:
        target: a recipe file, a package, or the name of a shipped recipe.
        overrides: `key=value`, of every cell.
        varied: values by recipe key, each as on the command line.
        seeds: how many, from the recipe's on.
        against: words of AGAINST.
        part: of the data; the test part by default, else the validation part.
    """

    target: str
    overrides: tuple[str, ...]
    varied: Mapping[str, tuple[str, ...]]
    seeds: int
    against: tuple[str, ...] = ()
    part: str | None = None


def parse_vary(words: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{"split.blocks": ("1", "3")} from ["split.blocks=1,3"]; values are YAML, as in overrides.

    Raises:
        UsageError: a word is not KEY=VALUE,VALUE, or gives no value, a key twice, or the seed.
    """
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not equals or not key or not values.strip():
            raise UsageError(
                f"{word!r} does not say what to vary", hint="write KEY=VALUE,VALUE, e.g. split.blocks=1,2,3"
            )
        if key == "seed":
            raise UsageError("seeds are not varied by key", hint="use --seeds N")
        if key in found:
            raise UsageError(f"{key} is varied twice", hint="give all its values in one --vary")
        try:
            listed = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            raise UsageError(f"the values of {key} are not YAML: {values!r}") from None
        said = (value if isinstance(value, str) else json.dumps(value) for value in listed)
        found[key] = tuple(dict.fromkeys(said))
    return found


def lay_out(request: Request, versions: Mapping[str, str]) -> list[Planned]:
    """All cells, seed by seed: the grid first, then the baselines; no training twice.

    Args:
        versions: of what runs them.

    Raises:
        UsageError: a recipe of the grid cannot be read, or the request is wrong.
    """
    if request.seeds < 1:
        raise UsageError(f"{request.seeds} seeds: at least one is needed")
    unknown = [word for word in request.against if word not in AGAINST]
    if unknown:
        known = ", ".join(AGAINST)
        raise UsageError(f"there is no baseline {unknown[0]}", hint=f"--against takes {known}" if known else "")
    base = read_origin(request.target, request.overrides).recipe
    part = request.part or base.data.test or base.data.validation
    if part is None:
        raise UsageError("which part of the data?", hint="name it with --part")
    asked = [baseline for word in request.against for baseline in AGAINST[word]]
    cut = fewest_blocks(base, request.varied)
    idle = () if baselines_denoise(base) else NOISE
    found: dict[str, Planned] = {}
    for seed in range(base.seed, base.seed + request.seeds):
        for combination in combinations(request.varied):
            planned = plan_cell(request, None, combination, seed, part, versions)
            if planned.recipe.split.blocks == 1:
                told = {k: v for k, v in combination.items() if k not in ONE_BLOCK}
                planned = plan_cell(request, None, told, seed, part, versions)
            found.setdefault(planned.cell.identity, planned)
        for baseline in (*ALWAYS, *asked):
            idles = (*baseline.ignores, *idle)
            heeded = {k: v for k, v in request.varied.items() if matches(k, baseline.heeds) or not ignored(k, idles)}
            for combination in combinations(heeded):
                same = () if BLOCKS in heeded else cut
                planned = plan_cell(request, baseline, combination, seed, part, versions, same)
                if not is_end_to_end(baseline, planned.recipe) and not is_untold(baseline, planned.recipe):
                    found.setdefault(planned.cell.identity, planned)
    return list(found.values())


def fewest_blocks(recipe: Recipe, varied: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """As an override, for a baseline that is the same for every cut: the recipe's own may not fit its network."""
    asked = [int(value) for value in varied.get(BLOCKS, ()) if value.isdigit() and int(value) > 1]
    fewer = [count for count in asked if recipe.split.blocks is not None and count < recipe.split.blocks]
    return (f"{BLOCKS}={min(fewer)}",) if fewer else ()


def combinations(varied: Mapping[str, tuple[str, ...]]) -> list[dict[str, str]]:
    return [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]


def ignored(key: str, ignores: Iterable[str]) -> bool:
    """Whether a baseline ignores a key; its method is its own."""
    return key == "train.method" or matches(key, ignores)


def matches(key: str, ones: Iterable[str]) -> bool:
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in ones)


def is_end_to_end(baseline: Baseline, recipe: Recipe) -> bool:
    """Whether the shallow control of a recipe is its end-to-end training: one block holds all layers."""
    looped = recipe.task is not None and named(recipe.task).looped
    return baseline is SHALLOW and recipe.split.blocks == 1 and not looped


def is_untold(baseline: Baseline, recipe: Recipe) -> bool:
    """Whether blocks cannot be told of each other as a form of DEPTH has it, as far as the recipe says."""
    lone = recipe.split.blocks == 1
    task = None if recipe.task is None else named(recipe.task)
    known = task is None or (recipe.split.context in task.contexts and recipe.train.z in task.zs)
    return baseline in DEPTH and (not known or (lone and recipe.split.context != "raw"))


def with_own_form(recipe: Recipe) -> Recipe:
    """The recipe with its task's own form of training in blocks where it leaves that open, as far as it says which."""
    if recipe.task is None:
        return recipe
    task = named(recipe.task)
    lone = recipe.package is not None or recipe.split.blocks == 1
    split = recipe.split if lone else replace(recipe.split, context=recipe.split.context or task.contexts[0])
    return with_own_z(replace(recipe, split=split), task)


def baselines_denoise(recipe: Recipe) -> bool:
    """Whether noise levels matter to baselines: not where they predict the target from x alone."""
    task = recipe.task
    if task is None and recipe.package is not None:
        task = read_plan(Path(recipe.package) / PLAN).task
    return task is None or named(task).denoiser


def plan_cell(
    request: Request,
    baseline: Baseline | None,
    combination: dict[str, str],
    seed: int,
    part: str,
    versions: Mapping[str, str],
    cut: tuple[str, ...] = (),
) -> Planned:
    """One cell.

    Args:
        cut: override of a baseline that is the same for every cut.
    """
    own = (*STAY, *baseline.overrides, *cut) if baseline else ()
    varied = [f"{key}={value}" for key, value in combination.items()]
    # A cell is evaluated once, when it is trained, on the part that is asked for, if nothing asks for more.
    along = any(word in ON_THE_WAY for word in request.against)
    evaluated = [f"data.validation={json.dumps(part)}", *WATCHED] if along else ["data.validation=null"]
    overrides = [*request.overrides, *varied, *own, f"seed={seed}", *evaluated]
    recipe = read_origin(request.target, overrides).recipe
    if baseline and recipe.task is not None:
        refuse_unlabelled(named(recipe.task), recipe.train.method)
    named_by = [baseline.name] if baseline else []
    name = ", ".join([*named_by, *varied]) or recipe.train.method
    content = {**placeless(with_own_form(recipe)), "log": None}
    told = identity({"recipe": content, "part": part, "versions": dict(versions)})
    optional = baseline is not None and baseline.optional
    return Planned(Cell(name, baseline.name if baseline else None, combination, seed, part, told, optional), recipe)


def placeless(recipe: Recipe) -> dict[str, Any]:
    """A recipe as data, with what its files hold in the place of where they lie: a cell is run again when they change,
    and not when they are moved. Of a package it is its plan."""
    content: dict[str, Any] = to_data(recipe)
    for key in ("source", "package", "weights"):
        content[key] = held(content[key])
    return {**content, "data": {**content["data"], "source": held(recipe.data.source)}}


def held(name: str | None) -> str | None:
    """What a file that a recipe names holds, and the function taken of it; names of anything else as they are."""
    if name is None:
        return None
    file, python, function = name.partition(".py:")
    path = Path(file + ".py") if python else Path(name)
    path = path / PLAN if (path / PLAN).is_file() else path
    if path.is_file() and path.suffix == ".py":
        return f"{path.name}:{function} {sha256_files(path.resolve().parent, tuple(map(str, named_neighbours(path))))}"
    return f"{path.name} {quick_digest(path)}" if path.is_file() else name
