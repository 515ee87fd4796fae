"""Opening a source: its network, an input for it, and what the analysis says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbconvert.anatomy import Anatomy
from dbconvert.checkpoint import load_weights
from dbconvert.engine.network import check_keys
from dbconvert.events import Reporter, Stage, silent
from dbconvert.graph.analysis import analyse
from dbconvert.graph.proof import prove
from dbconvert.graph.tape import refuse_opaque
from dbconvert.sources.base import Source
from dbconvert.sources.resolve import open_source


@dataclass
class Opened:
    """A network with what the analysis says of it."""

    source: Source
    model: nn.Module
    inputs: dict[str, Any]
    weights: str
    pretrained: bool
    anatomy: Anatomy


def inspect(
    source: str,
    *,
    stack: str | None = None,
    weights: str | None = None,
    seed: int = 0,
    report: Reporter = silent,
) -> Anatomy:
    """What the analysis sees of a network, proved by numbers.

    Args:
        source: `model.py`, `model.py:name`, a folder with a Transformers config.json, or a hub id.
        stack: path of the layers' container, when there are several.
        weights: a file of trained weights.
        seed: of the random initialisation where there are none.

    Raises:
        Refused: the network cannot be converted; the error names the node and the reason.
        DBConvertError: the source cannot be opened.
    """
    return open_and_analyse(source, stack=stack, weights=weights, seed=seed, report=report).anatomy


def open_and_analyse(source: str, *, stack: str | None, weights: str | None, seed: int, report: Reporter) -> Opened:
    report(Stage("reading the source"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        opened = open_source(source)
        model = opened.build()
    refuse_opaque(model)
    origin = fill_weights(opened, model, weights)
    inputs = opened.example_inputs(model)
    report(Stage("analysing the graph"))
    anatomy = analyse(model, inputs, stack=stack)
    report(Stage("proving by numbers"))
    anatomy = prove(model, anatomy, inputs)
    return Opened(opened, model, inputs, origin or f"random, seed {seed}", origin is not None, anatomy)


def fill_weights(source: Source, model: nn.Module, weights: str | None) -> str | None:
    """Trained weights from the file given, else from the source itself; returns where they came from."""
    if weights is None:
        return source.load_weights(model)
    given = load_weights(Path(weights))
    own = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in own.items():
        first.setdefault(id(tensor), name)
    needed = {name: tensor for name, tensor in own.items() if name in given or first[id(tensor)] == name}
    check_keys(given, needed, weights)
    model.load_state_dict(given, strict=False)
    return weights
