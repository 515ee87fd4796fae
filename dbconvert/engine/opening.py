"""Opening a source: its network, an input for it, and what the analysis says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbconvert.anatomy import Adapter, Anatomy
from dbconvert.engine.periphery import shortened
from dbconvert.engine.ram import refuse_too_large
from dbconvert.engine.trained import Fitted, fill_in, fit_weights
from dbconvert.engine.twin import Twin, find_twin, one_thread, proved_on
from dbconvert.errors import DBConvertError
from dbconvert.events import Note, Reporter, Stage, silent
from dbconvert.graph.account import parameter_bytes
from dbconvert.graph.analysis import analyse
from dbconvert.graph.fake import NEEDS_NUMBERS, is_empty
from dbconvert.graph.oracle import is_causal
from dbconvert.graph.proof import prove
from dbconvert.graph.tape import as_written, refuse_opaque
from dbconvert.sources.base import Source
from dbconvert.sources.fake_runs import runnable_on_fake
from dbconvert.sources.resolve import open_source
from dbconvert.weights import open_weights

LARGE = 2**30
"""Bytes of parameters above which a network is analysed without its weights. Up to here building it and proving it by
numbers takes seconds and a few GiB; beyond, both grow with the network, and the analysis needs neither."""
STREAMED = 2**23
"""The same where the weights are on disk and a twin can prove: they go from file to file, so that memory need not grow
with the checkpoint."""
UNPROVED = "proved on the graph only: {why}; --prove runs the proof by numbers on the real weights, whatever they take"


class NeedsNumbers(DBConvertError):
    """The analysis of a network without its weights came to a question that only they answer."""


@dataclass(frozen=True)
class Example:
    """A network with numbers, and its own anatomy."""

    model: nn.Module
    anatomy: Anatomy


@dataclass
class Opened:
    """A network with what the analysis says of it.

    Args:
        model: in eval mode or not; on the meta device (buffers apart) where `large`.
        inputs: arguments of its forward by name.
        trained: the trained weights that fit it, on disk; None where it has none. A large network has not read them.
        seed: of random weights.
        example: what can be run to learn more: the network itself or its twin; None where there is no twin.
    """

    source: Source
    model: nn.Module
    inputs: dict[str, Any]
    trained: Fitted | None
    seed: int
    anatomy: Anatomy
    example: Example | None

    @property
    def large(self) -> bool:
        """Whether the model holds no numbers."""
        return is_empty(self.model)

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
    drop_extra: bool = False,
    prove: bool = False,
    report: Reporter = silent,
) -> Anatomy:
    """What the analysis sees of a network, proved by numbers.

    Args:
        source: `model.py`, `model.py:name`, a folder of Transformers or diffusers, or a hub id.
        stack: path of the layers' container, when there are several.
        weights: a file of trained weights.
        seed: of the random initialisation where there are none.
        trust: run the code that a Transformers folder or repository brings along.
        drop_extra: leave out stored tensors that the network does not have.
        prove: prove a large network on its own weights, not on a small twin.

    Raises:
        Refused: the network cannot be converted; the error names the node and the reason.
        DBConvertError: the source cannot be opened, or its weights do not fit it.
    """
    opened = open_and_analyse(
        source,
        stack=stack,
        weights=weights,
        seed=seed,
        trust=trust,
        drop_extra=drop_extra,
        fetch=prove,
        whole=prove,
        report=report,
    )
    return opened.anatomy


def open_and_analyse(
    source: str,
    *,
    stack: str | None,
    weights: str | None,
    seed: int,
    report: Reporter,
    trust: bool = False,
    drop_extra: bool = False,
    fetch: bool = True,
    whole: bool = False,
) -> Opened:
    """Opens a source; a large network is analysed on fake tensors and proved on a twin, unless `whole`.

    Args:
        trust: run the code that it brings along.
        drop_extra: leave out stored tensors that the network does not have.
        fetch: download the weights of a hub repository where they are not here yet.
    """
    report(Stage("reading the source"))
    opened = open_source(source, trust=trust)
    stored = open_weights(Path(weights)) if weights is not None else opened.trained(fetch=fetch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = opened.build_within(LARGE if stored is None else min(STREAMED, LARGE))
    refuse_opaque(model)
    trained = None
    if stored is not None:
        origin = weights or opened.ref.location
        trained = fit_weights(opened, model, stored, origin=origin, drop_extra=drop_extra)
    if trained is not None and trained.dropped:
        report(Note(f"left out, since the network lacks them: {shortened(list(trained.dropped))}", warning=True))
    if is_empty(model) and not whole:
        found = analyse_large(opened, model, stack, trained, seed, report)
        if found is not None:
            return found
    model = materialised(opened, model, seed) if is_empty(model) else model
    return analyse_small(opened, model, stack, trained, seed, report)


@as_written()
def analyse_small(
    source: Source, model: nn.Module, stack: str | None, trained: Fitted | None, seed: int, report: Reporter
) -> Opened:
    """With its weights in memory, the trained ones where there are any."""
    if trained is not None:
        fill_in(source, model, trained)
    inputs = source.example_inputs(model)
    report(Stage("analysing the graph"))
    anatomy = analyse(model, inputs, stack=stack, adapter=adapter_of(source, stack))
    report(Stage("proving by numbers"))
    anatomy = prove(model, anatomy, inputs)
    anatomy = replace(anatomy, causal=is_causal(model, anatomy))
    return Opened(source, model, inputs, trained, seed, anatomy, Example(model, anatomy))


def adapter_of(source: Source, stack: str | None) -> Adapter | None:
    """The source's own word on its layers, unless a stack is asked for."""
    return source.adapter() if stack is None else None


@as_written()
def analyse_large(
    source: Source, model: nn.Module, stack: str | None, trained: Fitted | None, seed: int, report: Reporter
) -> Opened | None:
    """Without a weight in memory; None where that shows too little, and the network is small enough to be built."""
    report(Stage("analysing the graph without weights"))
    buildable = parameter_bytes(model.parameters()) <= LARGE
    try:
        inputs, anatomy, twin = analyse_with_twin(source, model, stack)
    except NeedsNumbers:
        if buildable:
            return None
        raise
    if twin is None and buildable:
        return None
    if twin is None:
        note = UNPROVED.format(why="no smaller network of the same structure was found")
        anatomy = replace(anatomy, notes=(*anatomy.notes, note))
    else:
        report(Stage("proving by numbers on a twin"))
        with one_thread():
            anatomy = proved_on(twin, anatomy)
            anatomy = replace(anatomy, causal=is_causal(twin.model, twin.anatomy))
    example = None if twin is None else Example(twin.model, twin.anatomy)
    return Opened(source, model, inputs, trained, seed, anatomy, example)


def analyse_with_twin(
    source: Source, model: nn.Module, stack: str | None
) -> tuple[dict[str, Any], Anatomy, Twin | None]:
    """Example inputs, anatomy and a twin. Where a twin confirms the batch axis, no second batch size is recorded."""
    inputs, anatomy = analyse_empty(source, model, stack, grow=False)
    with one_thread():
        twin = find_twin(source, anatomy, stack)
        if twin is None:
            inputs, anatomy = analyse_empty(source, model, stack, grow=True)
            twin = find_twin(source, anatomy, stack)
    return inputs, anatomy, twin


def analyse_empty(source: Source, model: nn.Module, stack: str | None, *, grow: bool) -> tuple[dict[str, Any], Anatomy]:
    """Example inputs and anatomy of a network without numbers.

    Raises:
        NeedsNumbers: its forward pass depends on the numbers of its weights.
    """
    try:
        with runnable_on_fake(model):
            inputs = source.example_inputs(model)
            return inputs, analyse(model, inputs, stack=stack, adapter=adapter_of(source, stack), grow=grow)
    except NEEDS_NUMBERS as error:
        raise NeedsNumbers(
            "the forward pass depends on numbers, which a network analysed without its weights does not have",
            where=type(model).__name__,
            why=str(error).strip().split("\n", 1)[0],
            hint="--prove builds it with its weights, whatever they take",
        ) from error


def materialised(source: Source, model: nn.Module, seed: int) -> nn.Module:
    """A network with numbers in the place of an empty one.

    Raises:
        DBConvertError: it does not fit into memory; nothing has been allocated then.
    """
    refuse_too_large(parameter_bytes(model.parameters()), type(model).__name__)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return source.build()
