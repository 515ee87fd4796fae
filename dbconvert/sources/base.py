"""What a source is: something that builds a network and knows an input for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import nn

from dbconvert.plan import SourceRef


class Source(ABC):
    """A place a network comes from."""

    @property
    @abstractmethod
    def ref(self) -> SourceRef:
        """What a plan keeps of it."""

    @abstractmethod
    def build(self) -> nn.Module:
        """A fresh network with its own initialisation; the caller seeds."""

    @abstractmethod
    def load_weights(self, model: nn.Module) -> str | None:
        """Fills in the weights that belong to the source itself; returns their origin, None if there are none."""

    @abstractmethod
    def example_inputs(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of the network's forward by name, batch first."""

    @abstractmethod
    def copy_to(self, folder: Path) -> None:
        """Writes everything that building the network needs into a folder."""
