"""The way back: from a package whose blocks were not trained to the original network's own weights."""

from __future__ import annotations

from pathlib import Path

from dbconvert.checkpoint import load_tensors
from dbconvert.engine.package import PERIPHERY, WEIGHTS, Package, block_file, open_package
from dbconvert.engine.runs import RUN, read_info
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.graph.inject import PREFIX
from dbconvert.stream import Item
from dbconvert.tensorfile import read_header


def open_untrained(targets: list[str]) -> Package:
    """The one package named.

    Raises:
        UsageError: none or several are named, or it is not a package.
        DBConvertError: it is a run: its blocks were trained.
    """
    if len(targets) != 1:
        raise UsageError("--original turns one package back", hint="dbconvert assemble PACKAGE --original -o FOLDER")
    folder = Path(targets[0])
    if (folder / RUN).is_file():
        info = read_info(folder)
        raise DBConvertError(
            f"{folder} was trained ({info.updates} updates), so it cannot be turned back into the original network",
            why="trained blocks denoise: run one after the other without noise they compute nothing of use",
            hint=f"use it in block form, or turn back the package it came from: {info.package}",
        )
    return open_package(folder)


def original_items(package: Package) -> dict[str, Item]:
    """The network's own tensors as a checkpoint of the original holds them.

    Raises:
        DBConvertError: a file is missing or is not the one that was written.
    """
    plan = package.plan
    files = [package.folder / WEIGHTS / name for name in (*map(block_file, range(len(plan.blocks))), PERIPHERY)]
    for file in files:
        package.check(file.name)
    items: dict[str, Item] = {}
    if plan.keys == "source" or plan.source.kind == "model_file":
        for file in files:
            items.update({k: v for k, v in read_header(file)[0].items() if not k.startswith(PREFIX + ".")})
    else:
        tensors = {k: v for file in files for k, v in load_tensors(file).items() if not k.startswith(PREFIX + ".")}
        items.update(package.source().to_stored(tensors))
    if plan.source.kind == "model_file":
        give_all_names(items, plan.anatomy.tied)
    return items


def give_all_names(items: dict[str, Item], tied: tuple[tuple[str, ...], ...]) -> None:
    """Stores tied tensors under each of their names, as load_state_dict wants them."""
    for group in tied:
        first = next(items[name] for name in group if name in items)
        items.update(dict.fromkeys(group, first))
