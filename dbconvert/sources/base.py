"""What a source is: something that builds a network and knows an input for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
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
    def build_within(self, limit: int) -> nn.Module:
        """As `build`; a network whose parameters take more than `limit` bytes has them on the meta device instead."""

    @abstractmethod
    def weights_location(self) -> str | None:
        """Where the weights that belong to the source itself are; None if there are none."""

    @abstractmethod
    def twins(self) -> Iterator[Source]:
        """Smaller networks of the same architecture, the likeliest first; none where the source tells no sizes."""

    @abstractmethod
    def load_weights(self, model: nn.Module) -> str | None:
        """Fills in the weights that belong to the source itself; returns their origin, None if there are none."""

    @abstractmethod
    def example_inputs(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of the network's forward by name, batch first. The network must be able to run."""

    @abstractmethod
    def longest(self) -> int | None:
        """How many tokens the network's positions reach; None where the source does not tell."""

    @abstractmethod
    def copy_to(self, folder: Path) -> None:
        """Writes everything that building the network needs into a folder."""
