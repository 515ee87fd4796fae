"""The proof of a network that is too large for one: made on a small twin of the same structure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dbconvert.anatomy import Anatomy, Check, Layer
from dbconvert.errors import DBConvertError
from dbconvert.graph.analysis import Inputs, analyse
from dbconvert.graph.fake import build_up_to
from dbconvert.graph.proof import prove
from dbconvert.sources.base import Source

LARGEST = 64_000_000
"""Bytes of parameters of a twin: its proof then takes about a second."""
MISFITS = (DBConvertError, RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError)
"""What networks raise whose sizes do not fit together."""


@dataclass(frozen=True)
class Twin:
    """A small network with numbers."""

    model: nn.Module
    inputs: Inputs
    anatomy: Anatomy

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def find_twin(source: Source, anatomy: Anatomy, stack: str | None) -> Twin | None:
    """The first twin of a source whose structure is that of `anatomy`; None if there is none."""
    wanted = structure(anatomy)
    for small in source.twins():
        twin = opened_twin(small, stack)
        if twin is not None and structure(twin.anatomy) == wanted:
            return twin
    return None


def opened_twin(source: Source, stack: str | None) -> Twin | None:
    """A twin, analysed; None where its sizes do not fit together, or it is refused."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = build_up_to(source.build, LARGEST)
            if model is None:
                return None
            inputs = source.example_inputs(model)
            return Twin(model, inputs, analyse(model, inputs, stack=stack))
        except MISFITS:
            return None


def proved_on(twin: Twin, anatomy: Anatomy) -> Anatomy:
    """`anatomy` with the checks that were made on its twin, each of which says so.

    Raises:
        Refused: a check fails on the twin.
    """
    proof = prove(twin.model, twin.anatomy, twin.inputs).proof
    where = f"on a twin of {twin.parameters:,} parameters and {twin.anatomy.depth} layers with the same structure"
    return replace(anatomy, proof=tuple(Check(c.name, c.passed, f"{where}; {c.detail}") for c in proof))


# -- structure --------------------------------------------------------------------------------------------------


def structure(anatomy: Anatomy) -> dict[str, Any]:
    """All that a twin must share: every fact about the stack and each kind of layer, but for sizes and depth."""
    head = anatomy.head
    return {
        "verdict": anatomy.verdict,
        "network": anatomy.network,
        "stack": anatomy.stack,
        "calls": anatomy.calls,
        "streams": anatomy.streams,
        "axes": anatomy.axes,
        "rank": len(anatomy.stream_shape),
        "post norm": anatomy.post_norm,
        "stem": anatomy.stem.modules,
        "readout": anatomy.readout.modules,
        "head": head and (head.module, head.output, head.token, head.pooled, head.labels, len(head.after)),
        "embedding": anatomy.embedding and (anatomy.embedding.module, anatomy.embedding.argument),
        "inputs": tuple((given.name, len(given.shape), given.dtype) for given in anatomy.inputs),
        "layers": {kind(layer) for layer in anatomy.layers},
    }


def kind(layer: Layer) -> tuple[Any, ...]:
    """What two layers of one kind share: modules, placements, axes, stream, side inputs and form of the output."""
    branches = tuple(
        (b.placement, b.norm.module, b.norm.axes, b.norm.arguments, b.gate.module, b.gate.axes, b.gate.output)
        for b in layer.branches
    )
    sides = tuple((side.argument, len(side.shape), side.dtype, side.shared) for side in layer.side_inputs)
    streams = (layer.stream_in, layer.stream_out, layer.second_in, layer.second_out)
    return (layer.type, *streams, layer.form, branches, len(layer.on_spine), sides)


@contextmanager
def one_thread() -> Iterator[None]:
    """A twin is so small that threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
