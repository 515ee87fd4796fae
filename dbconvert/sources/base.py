"""What a source is: something that builds a network, knows an input for it and where its trained weights are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Adapter
from dbconvert.diffusion.predictions import Prediction
from dbconvert.graph.account import parameter_bytes
from dbconvert.graph.fake import empty_weights
from dbconvert.plan import SourceRef
from dbconvert.weights import Trained


class Source(ABC):
    """A place a network comes from.

    Trained weights may be stored under other keys than the network's own, and several stored tensors may make up one
    of the network's. The names here: a *stored* key is one in a weights file, a *network* key one of its state.

    Attributes:
        folder: where its configuration, tokenizer and the like lie; None where it has no such folder.
    """

    folder: Path | None = None

    @property
    @abstractmethod
    def ref(self) -> SourceRef:
        """What a plan keeps of it."""

    @abstractmethod
    def build(self) -> nn.Module:
        """A fresh network with its own initialisation; the caller seeds."""

    def build_within(self, limit: int) -> nn.Module:
        """As `build`; a network whose parameters take more than `limit` bytes has them on the meta device instead."""
        with torch.random.fork_rng(devices=[]), empty_weights():
            model = self.build()
        return model if parameter_bytes(model.parameters()) > limit else self.build()

    @abstractmethod
    def twins(self) -> Iterator[Source]:
        """Smaller networks of the same architecture, the likeliest first; none where the source tells no sizes."""

    @abstractmethod
    def example_inputs(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of the network's forward by name, batch first. The network must be able to run."""

    @abstractmethod
    def longest(self) -> int | None:
        """How many tokens the network's positions reach; None where the source does not tell."""

    def adapter(self) -> Adapter | None:
        """What the source says of its layers itself; nothing by default."""
        return None

    def prediction(self) -> Prediction | None:
        """What a denoiser of images was trained to predict, where the source tells; nothing by default."""
        return None

    @abstractmethod
    def copy_to(self, folder: Path) -> None:
        """Writes everything that building the network needs into a folder, and the small files that belong to it."""

    # -- weights ------------------------------------------------------------------------------------------

    @abstractmethod
    def trained(self, *, fetch: bool) -> Trained | None:
        """The weights that belong to the source itself, None if there are none.

        Args:
            fetch: download them where they are not here yet; without it they count as absent then.
        """

    @abstractmethod
    def homes(self, keys: Iterable[str]) -> dict[str, str]:
        """The network key that each stored key goes to (the first, if several); one the network does not have where
        nothing is known of it."""

    @abstractmethod
    def to_network(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors as the network's own: renamed, put together or cut apart; unknown ones are left out."""

    @abstractmethod
    def to_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's own tensors as its weights files would hold them."""

    @abstractmethod
    def needed(self, missing: set[str]) -> set[str]:
        """Those of the missing network keys that a weights file must hold."""

    @abstractmethod
    def telling(self, unknown: set[str]) -> set[str]:
        """Those of the unknown keys that say that a weights file belongs to another network."""


class PlainKeys(Source):
    """A source whose weights are stored under the network's own keys."""

    def homes(self, keys: Iterable[str]) -> dict[str, str]:
        return {key: key for key in keys}

    def to_network(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def to_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def needed(self, missing: set[str]) -> set[str]:
        return missing

    def telling(self, unknown: set[str]) -> set[str]:
        return unknown
