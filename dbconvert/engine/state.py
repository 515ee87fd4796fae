"""The state of training on disk: complete, atomic, and read back to the bit.

A state is a folder with the weights, the optimisers' tensors and state.json. There are no random number states
and no data position in it, because both are functions of the seed, the block and the update (data/batches.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dbconvert.checkpoint import load_tensors, save_tensors
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.optimizers import joined, parts
from dbconvert.engine.units import Unit
from dbconvert.errors import DBConvertError
from dbconvert.files import MARKER, atomic_folder
from dbconvert.plan import NoiseFit
from dbconvert.schema import parse, read_json, record, to_json

WEIGHTS, OPTIMIZERS, STATE = "weights.safetensors", "optimizers.safetensors", "state.json"


@record
class TrainingState:
    """state.json: updates of the run and of each unit, the noise in force, and what of the optimisers is no tensor.

    Args:
        seconds: of training so far.
    """

    updates: int
    done: dict[str, int]
    scalars: dict[str, float]
    metrics_bytes: int
    noise: NoiseFit
    seconds: float = 0.0


@dataclass(frozen=True)
class Done:
    """How far a run is: updates, seconds of training, bytes of metrics."""

    updates: int
    seconds: float
    metrics_bytes: int


def save_state(folder: Path, network: BlockwiseNetwork, units: list[Unit], far: Done, noise: NoiseFit) -> None:
    """Writes checkpoints/update-N and then removes the older ones."""
    with atomic_folder(folder / f"update-{far.updates:08d}", force=True) as temporary:
        save_tensors(temporary / WEIGHTS, network.tensors())
        tensors, scalars = optimizer_state(units)
        save_tensors(temporary / OPTIMIZERS, tensors)
        done = {unit.name: unit.done for unit in units}
        state = TrainingState(far.updates, done, scalars, far.metrics_bytes, noise, round(far.seconds, 4))
        (temporary / STATE).write_text(to_json(state), encoding="utf-8")
    for older in sorted(folder.glob("update-*"))[:-1]:
        shutil.rmtree(older)


def newest_state(folder: Path) -> Path | None:
    """The newest whole state, None before the first. Left-overs of an interrupted write are removed."""
    for broken in folder.glob(".*.tmp"):
        if (broken / MARKER).exists():
            shutil.rmtree(broken)
    states = sorted(folder.glob("update-*"))
    return states[-1] if states else None


def load_state(
    folder: Path, network: BlockwiseNetwork, units: list[Unit], bring: Callable[[Unit], None] = lambda _: None
) -> TrainingState:
    """Puts a saved state into a network and its optimisers.

    Args:
        bring: called with each unit before its optimiser's state is put where its parameters are.
    """
    state = parse(TrainingState, read_json(folder / STATE), file=str(folder / STATE))
    network.load(load_tensors(folder / WEIGHTS), where=str(folder / WEIGHTS))
    if set(state.done) != {unit.name for unit in units}:
        raise DBConvertError(f"{folder} holds {', '.join(state.done)}, not what this run trains")
    tensors = load_tensors(folder / OPTIMIZERS)
    for unit in units:
        unit.done = state.done[unit.name]
        bring(unit)
        restore_optimizer(unit, tensors, state.scalars)
    return state


def optimizer_state(units: list[Unit]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Optimiser state by `unit/parameter/name`: tensors, and plain numbers."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    for unit in units:
        for key, parameter in unit.parameters.items():
            kept = unit.optimizer.state.get(parameter, {})
            for name, value in [pair for slot, whole in kept.items() for pair in parts(slot, whole).items()]:
                place = f"{unit.name}|{key}|{name}"
                if isinstance(value, Tensor):
                    tensors[place] = value
                elif value is not None:
                    scalars[place] = value
    return tensors, scalars


def restore_optimizer(unit: Unit, tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
    found: dict[str, dict[str, Any]] = {}
    for place, value in [*tensors.items(), *scalars.items()]:
        name, key, slot = place.split("|")
        if name == unit.name:
            found.setdefault(key, {})[slot] = value
    for key, parameter in unit.parameters.items():
        if key in found:
            unit.optimizer.state[parameter] = joined(found[key], parameter, unit.optimizer)


def truncate_metrics(path: Path, size: int) -> None:
    """Forgets what was logged after the state was saved."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(size)
