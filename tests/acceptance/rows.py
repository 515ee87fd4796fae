"""One row of the acceptance table: how a network is built and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from networks import DEPTH
from torch import nn

Built = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A network and its outcome.

    Args:
        make: builds the network and the arguments of its forward.
        verdict: `accepted`, `restricted`, `looped` or `refused`.
        layers, width, branches: of the stack; None where they are not checked (or differ from layer to layer).
        post: whether norms or activations stand on the spine.
        stack: given to the analysis, as with --stack.
        kind, node: of the refusal: its kind, and what the named node or the reason contains.
        mixes: whether examples of a batch meet in one computation (experts), so that another example may change
            the order of sums.
        batch: the stream's batch axis.
        conditioned: whether the network takes a condition of its own, so that nothing is injected.
        streams: that are carried from layer to layer.
    """

    make: Callable[[], Built]
    verdict: str = "accepted"
    layers: int | None = DEPTH
    width: int | None = None
    branches: int | None = None
    post: bool = False
    stack: str | None = None
    kind: str | None = None
    node: str = ""
    mixes: bool = False
    conditioned: bool = False
    streams: int = 1
    batch: int = 0

    def build(self) -> Built:
        torch.manual_seed(0)
        model, inputs = self.make()
        return model.eval(), inputs
