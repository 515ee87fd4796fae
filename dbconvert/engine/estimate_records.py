"""What `estimate` is asked and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dbconvert.engine.holdings import Holding
from dbconvert.engine.rehearsal import Case
from dbconvert.plan import Context
from dbconvert.recipe import OptimizerName
from dbconvert.schema import Positive, record

Where = Literal["resident", "away"]


@record
class Request:
    """What is asked.

    Args:
        memory: of the device, in bytes; None chooses nothing.
        case: batch, length, size and precision of an update.
        in_backward: the optimiser steps in the backward pass, see `optimizer.in_backward`.
        recompute_modulation: see `train.recompute_modulation`; checkpointed layers have no use for it.
        context: what blocks hear of each other.
        task: None is the only one that fits the network.
    """

    memory: Positive | None = None
    case: Case = Case()
    optimizer: OptimizerName = "adamw"
    in_backward: bool = False
    recompute_modulation: bool = False
    context: Context | None = None
    task: str | None = None


@dataclass(frozen=True)
class Setting:
    """Where inactive blocks are while one trains, and whether layers are checkpointed."""

    inactive: Where
    checkpointing: bool

    @property
    def words(self) -> str:
        return f"inactive blocks {self.inactive}, {'with' if self.checkpointing else 'without'} checkpointing"


SETTINGS = tuple(Setting(where, checkpointing) for where in ("resident", "away") for checkpointing in (False, True))


@dataclass(frozen=True)
class Row:
    """One number of blocks.

    Args:
        blocks: None is the network as it is, trained end-to-end.
        layers: of its largest block: what one update runs forward and backward.
        holdings: what an update of the block that needs most holds, by setting; end-to-end has no inactive blocks.
        evaluations: layers that run for one prediction from noise; `passes` counts those through stem and head.
        before: layers that run forward first, without gradient, for blocks to be told; the mean over the blocks.
    """

    blocks: int | None
    layers: int
    holdings: dict[Setting, Holding]
    evaluations: int
    passes: int
    before: float = 0.0


@dataclass(frozen=True)
class Advice:
    """The least memory, in bytes, that a change of the request would need, and whether that fits."""

    change: str
    blocks: int
    setting: Setting
    total: int
    fits: bool


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found.

    Args:
        request: with the length that was settled.
        best: the fewest blocks that fit, and the setting they fit in; None where nothing fits.
        advice: when nothing fits, what would.
    """

    network: str
    task: str | None
    depth: int
    request: Request
    rows: tuple[Row, ...]
    smallest: dict[Setting, int | None]
    best: tuple[int, Setting] | None
    evidence: tuple[str, ...]
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]
