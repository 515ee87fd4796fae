"""Losses of updates, which stay on the device until they are read: reading one waits for all that was asked before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dbconvert.engine.state import newest_state
from dbconvert.engine.units import Unit
from dbconvert.errors import DBConvertError

MOST = 1000
"""Updates that go unread at the most."""


@dataclass(frozen=True)
class Seen:
    """What is kept of an update: where it was, and for each example whether its loss is finite, and its levels."""

    place: str
    finite: Tensor
    lowest: Tensor
    highest: Tensor


class Watch:
    """Raises for a loss that is not finite: at once, or where losses are read late when they are read.

    Args:
        late: leave losses where they are.
        told: whether levels mean anything.
        states: the folder of the run's states.
    """

    def __init__(self, states: Path, *, late: bool, told: bool) -> None:
        self.states, self.late, self.told = states, late, told
        self.unread: list[Seen] = []

    def saw(self, unit: Unit, update: int, loss: Tensor, losses: Tensor, sigma: Tensor) -> None:
        """Takes note of an update, `update` of the run, before it is made.

        Args:
            loss: the mean of the losses, which is finite only where all of them are.

        Raises:
            DBConvertError: a loss is not finite.
        """
        if not self.late and math.isfinite(float(loss)):
            return
        rows, levels = losses.detach().reshape(len(losses), -1), sigma.reshape(len(sigma), -1)
        place = f"{unit.name}, its update {unit.done + 1}, update {update} of the run"
        self.unread.append(Seen(place, torch.isfinite(rows).all(1), levels.amin(1), levels.amax(1)))
        if not self.late or len(self.unread) >= MOST:
            self.read()

    def read(self) -> None:
        """Waits for the updates that were noted.

        Raises:
            DBConvertError: a loss of theirs is not finite; it tells of the first.
        """
        seen, self.unread = self.unread, []
        if not seen:
            return
        whole = torch.stack([each.finite.all() for each in seen]).tolist()
        if not all(whole):
            first = whole.index(False)
            raise self.not_finite(seen[first], len(seen) - 1 - first)

    def not_finite(self, seen: Seen, later: int) -> DBConvertError:
        bad = ~seen.finite
        low, high = float(seen.lowest[bad].min()), float(seen.highest[bad].max())
        levels = f", sigma {low:.4g} to {high:.4g}" if self.told else ""
        after = f"; {later} more were made before losses were read" if later else ""
        state = newest_state(self.states)
        kept = f"; the last whole state is {state}" if state else ""
        return DBConvertError(
            f"the loss is not finite for {int(bad.sum())} of {len(bad)} examples",
            where=f"{seen.place}{levels}{after}",
            hint=f"lower optimizer.lr, clip gradients with train.clip, or look at those examples{kept}",
        )
