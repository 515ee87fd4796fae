"""Trained weights that fit a network: every tensor accounted for before anything is read or written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dbconvert.checkpoint import load_tensors
from dbconvert.engine.periphery import shortened
from dbconvert.errors import DBConvertError
from dbconvert.sources.base import Source
from dbconvert.stream import Item, kind_of
from dbconvert.tensorfile import Stored
from dbconvert.weights import Trained, equal

Tied = Iterable[tuple[str, ...]]


@dataclass(frozen=True)
class Fitted:
    """Trained weights by stored key, each with the network key it goes to.

    Args:
        absent: network keys that no weights file need hold: they keep what the network was built with.
        dropped: stored keys that were left out because the network does not have them, as was asked for.
    """

    origin: str
    items: Mapping[str, Item]
    homes: Mapping[str, str]
    absent: frozenset[str]
    dropped: tuple[str, ...]


def fit_weights(source: Source, model: nn.Module, trained: Trained, *, origin: str, drop_extra: bool) -> Fitted:
    """Trained weights, checked against the network.

    Args:
        model: on any device, as the source built it.
        origin: where the weights came from, as a plan records it.
        drop_extra: leave out tensors that the network does not have.

    Raises:
        DBConvertError: tensors are missing, unknown, of another shape, or quantised; the message names them.
    """
    state = model.state_dict(keep_vars=True)
    homes = source.homes(trained.items)
    unknown = {key for key, home in homes.items() if home not in state}
    refuse_quantised(trained, homes, state)
    found = source.to_network(trained.outlines())
    groups = tied_names(state)
    covered = set(found) | {name for group in groups for name in group if not found.keys().isdisjoint(group)}
    missing, extra = set(state) - covered, source.telling(unknown)
    refuse_misfits(
        trained.location,
        {key: tuple(value.shape) for key, value in found.items() if key in state},
        {key: tuple(value.shape) for key, value in state.items()},
        missing=source.needed(missing),
        unknown=set() if drop_extra else extra,
    )
    items = {key: item for key, item in trained.items.items() if key not in unknown}
    for group in groups:
        items = without_copies(items, homes, group, trained.location)
    return Fitted(
        origin,
        items,
        {key: homes[key] for key in items},
        frozenset(missing),
        tuple(sorted(extra)),
    )


def fill_in(source: Source, model: nn.Module, fitted: Fitted) -> None:
    """Copies trained weights into a network."""
    tensors = {key: item for key, item in fitted.items.items() if isinstance(item, Tensor)}
    for path in {item.path for item in fitted.items.values() if isinstance(item, Stored)}:
        tensors.update(load_tensors(path, set(fitted.items)))
    model.load_state_dict(source.to_network(tensors), strict=False)


def tied_names(state: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Groups of names that are one tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return [tuple(group) for group in names.values() if len(group) > 1]


def refuse_quantised(trained: Trained, homes: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """Numbers of 8 bits and fewer, or whole ones, where the network has real ones."""
    quantised = sorted(
        key
        for key, item in trained.items.items()
        if kind_of(item).startswith("F8")
        or (homes[key] in state and state[homes[key]].is_floating_point() and not kind_of(item).startswith(("F", "BF")))
    )
    if quantised:
        raise DBConvertError(
            f"the weights of {trained.location} are quantised: {len(quantised)} tensors hold"
            f" {', '.join(sorted({kind_of(trained.items[key]) for key in quantised}))} numbers",
            where=shortened(quantised),
            why="quantised weights cannot be trained",
            hint="give the checkpoint that it was made from, in 32 or 16 bit",
        )


def refuse_misfits(
    location: str,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    *,
    missing: set[str],
    unknown: set[str],
) -> None:
    other = [
        f"{key} (has {list(shape)}, wants {list(wanted[key])})"
        for key, shape in sorted(found.items())
        if shape != wanted[key]
    ]
    lists = {"missing": sorted(missing), "unknown": sorted(unknown), "of another shape": other}
    parts = [f"{len(names)} {kind}: {shortened(names)}" for kind, names in lists.items() if names]
    if parts:
        only_extra = bool(unknown) and not missing and not other
        raise DBConvertError(
            "the weights do not fit the network",
            where=location,
            why="; ".join(parts),
            hint="if the network does not need the unknown ones, leave them out with --drop-extra"
            if only_extra
            else "give the weights of exactly this architecture, or correct the configuration",
        )


def without_copies(
    items: dict[str, Item], homes: Mapping[str, str], group: tuple[str, ...], where: str
) -> dict[str, Item]:
    """Leaves out the further copies of a tensor that the network has only once.

    Raises:
        DBConvertError: the copies differ, so that the weights belong to a network where they are not tied.
    """
    keys = [key for name in group for key in items if homes[key] == name]
    for key in keys[1:]:
        if homes[key] != homes[keys[0]] and not equal(items[keys[0]], items[key]):
            raise DBConvertError(
                f"{keys[0]} and {key} are one tensor in the network and differ in the weights",
                where=where,
                hint='a Transformers configuration says so with "tie_word_embeddings": false',
            )
    dropped = {key for key in keys[1:] if homes[key] != homes[keys[0]]}
    return {key: item for key, item in items.items() if key not in dropped}


def settled(tensors: dict[str, Tensor], tied: Tied) -> dict[str, Tensor]:
    """Network tensors with every tied one under the first of its names alone."""
    found = dict(tensors)
    for group in tied:
        present = [found.pop(name) for name in group if name in found]
        if present:
            found[group[0]] = present[0]
    return found
