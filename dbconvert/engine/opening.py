"""Opening a source: its network, an input for it, and what the analysis says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dbconvert.anatomy import Anatomy
from dbconvert.engine.trained import Fitted, fit_weights
from dbconvert.events import Reporter, Stage, silent
from dbconvert.graph.analysis import analyse
from dbconvert.graph.proof import prove
from dbconvert.graph.tape import refuse_opaque
from dbconvert.sources.base import Source
from dbconvert.sources.resolve import open_source


@dataclass
class Opened:
    """A network with what the analysis says of it, and the trained weights that fit it: those stay on disk."""

    source: Source
    model: nn.Module
    inputs: dict[str, Any]
    trained: Fitted | None
    seed: int
    anatomy: Anatomy

    @property
    def weights(self) -> str:
        """What the weights are, in words."""
        return self.trained.origin if self.trained is not None else f"random, seed {self.seed}"

    @property
    def pretrained(self) -> bool:
        return self.trained is not None


def inspect(
    source: str,
    *,
    stack: str | None = None,
    weights: str | None = None,
    seed: int = 0,
    trust: bool = False,
    report: Reporter = silent,
) -> Anatomy:
    """What the analysis sees of a network, proved by numbers.

    Args:
        source: `model.py`, `model.py:name`, a folder with a Transformers config.json, or a hub id.
        stack: path of the layers' container, when there are several.
        weights: a file of trained weights.
        seed: of the random initialisation where there are none.
        trust: run the code that a Transformers folder or repository brings along.

    Raises:
        Refused: the network cannot be converted; the error names the node and the reason.
        DBConvertError: the source cannot be opened, or its weights do not fit it.
    """
    opened = open_and_analyse(source, stack=stack, weights=weights, seed=seed, trust=trust, fetch=False, report=report)
    return opened.anatomy


def open_and_analyse(
    source: str,
    *,
    stack: str | None,
    weights: str | None,
    seed: int,
    report: Reporter,
    trust: bool = False,
    fetch: bool = True,
) -> Opened:
    """See `inspect`.

    Args:
        fetch: download the weights of a hub repository where they are not here yet.
    """
    report(Stage("reading the source"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        opened = open_source(source, trust=trust)
        model = opened.build()
    refuse_opaque(model)
    trained = fit_weights(opened, model, weights, fetch=fetch)
    inputs = opened.example_inputs(model)
    report(Stage("analysing the graph"))
    anatomy = analyse(model, inputs, stack=stack)
    report(Stage("proving by numbers"))
    anatomy = prove(model, anatomy, inputs)
    return Opened(opened, model, inputs, trained, seed, anatomy)
