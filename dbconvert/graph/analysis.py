"""From a network and an example input to its Anatomy, or to a refusal that names the node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy, Axes, Input, Layer, Verdict
from dbconvert.errors import Refused
from dbconvert.graph.diagnosis import changing_stages, why_no_stack
from dbconvert.graph.evidence import Evidence, refuse_divergence
from dbconvert.graph.layers import entry, layer_calls, outside_parts, read_layers, read_outside
from dbconvert.graph.parts import find_head, stem_and_readout
from dbconvert.graph.spine import find_spines
from dbconvert.graph.stack import Stack, choose_stack, refuse_decisions, wanted_stack
from dbconvert.graph.tape import Recording, record

Inputs = dict[str, Any]
"""Arguments of the network's forward by name."""
ONE_BATCH_SIZE = "the network runs one batch size only, so the batch axis is taken to be the first"

CHOICES = ("several-stacks", "dimensions")
"""Refusals that leave the choice of a stack to the user."""


def analyse(model: nn.Module, inputs: Inputs, *, stack: str | None = None, grow: bool = True) -> Anatomy:
    """Finds the residual stack of a network and everything needed to cut it.

    Args:
        model: any module; it is put into eval mode for the recording and back afterwards.
        inputs: arguments of its forward, batch first, at least one example.
        stack: path of the module that holds the layers, when there are several.
        grow: record a larger batch too, which tells the batch axis; else it is taken to be the first.

    Raises:
        Refused: the network cannot be cut; the error names the node and the reason.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        evidence = gather(model, inputs, grow)
        anatomy = read(evidence, inputs, stack)
        untold = grow and evidence.grown is None
        return replace(anatomy, notes=(ONE_BATCH_SIZE, *anatomy.notes)) if untold else anatomy
    finally:
        for module, training in modes.items():
            module.training = training


def gather(model: nn.Module, inputs: Inputs, grow: bool = True) -> Evidence:
    """The recordings of a network; where no stack shows, those that also look into layers without child modules."""
    evidence = gather_once(model, inputs, grow, deep=False)
    if evidence.stacks:
        return evidence
    deeper = gather_once(model, inputs, grow, deep=True)
    return deeper if deeper.stacks else evidence


def gather_once(model: nn.Module, inputs: Inputs, grow: bool, *, deep: bool) -> Evidence:
    recording = record(model, (), inputs, deep=deep)
    grown = record_grown(model, inputs, deep=deep) if grow else None
    return Evidence(model, recording, find_spines(recording, model), grown)


def record_grown(model: nn.Module, inputs: Inputs, *, deep: bool) -> Recording | None:
    """A recording with one more example; None if the network is built for one batch size."""
    try:
        return record(model, (), grow_batch(inputs), deep=deep)
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return None


def grow_batch(inputs: Inputs) -> Inputs:
    """The same inputs with the first example repeated once more."""
    batch = next((v.shape[0] for v in inputs.values() if isinstance(v, Tensor) and v.dim()), 0)

    def grow(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.dim() and value.shape[0] == batch
        return torch.cat([value, value[:1]]) if batched else value

    return {name: grow(value) for name, value in inputs.items()}


def read(evidence: Evidence, inputs: Inputs, wanted: str | None) -> Anatomy:
    """The anatomy of the stack that is wanted, or of the one there is.

    Raises:
        Refused: with a hint that names the parts that would convert, when none was wanted.
    """
    stacks = evidence.stacks
    if not stacks:
        raise why_no_stack(evidence)
    try:
        chosen = choose_stack(stacks, wanted, evidence.model)
        changing = changing_stages(evidence, chosen)
        if changing is not None and wanted is None:
            raise changing
        return read_stack(evidence, inputs, chosen, stacks, part=changing is not None)
    except Refused as refusal:
        if wanted is None:
            offer(refusal, evidence, inputs, stacks)
        raise


def offer(refusal: Refused, evidence: Evidence, inputs: Inputs, stacks: list[Stack]) -> None:
    """Adds to a refusal which parts of the network would convert: other stacks, or all layers but the first or last."""
    container = stacks[0].container
    others = [stack.container for stack in stacks if stack is not stacks[0]]
    named = [container, *others] if refusal.kind in CHOICES else [f"{container}[1:]", f"{container}[:-1]", *others]
    found = []
    for wanted in named:
        try:
            found.append((wanted, read_stack(evidence, inputs, wanted_stack(stacks, wanted, evidence.model), stacks)))
        except Refused:
            continue
    if found:
        parts = "; ".join(f"--stack {wanted} ({part.depth} layers)" for wanted, part in found)
        kept = "" if refusal.kind in CHOICES or not refusal.hint else f"{refusal.hint}; or "
        refusal.hint = f"{kept}convert a part: {parts}"
    refusal.facts["stacks"] = [wanted for wanted, _ in found]


def read_stack(evidence: Evidence, inputs: Inputs, chosen: Stack, stacks: list[Stack], *, part: bool = True) -> Anatomy:
    """The anatomy of a network whose layers are those of `chosen`.

    Args:
        part: the network has more to it than this stack.
    """
    model, recording = evidence.model, evidence.recording
    paths = tuple(path for path, _ in chosen.layers)
    others = [stack for stack in stacks if not any(inside(path, paths) for path, _ in stack.layers)]
    refuse_decisions(recording, paths)
    facts: dict[str, object] = {"stack": chosen.container, "layers": len(paths), "calls": chosen.calls}
    try:
        calls = layer_calls(chosen, evidence)
        refuse_divergence(evidence, {call.order for call in calls})
        _, entering, _ = entry(calls[0], chosen.layers[0][1][0], evidence)
        channel = evidence.channel_axis(entering)
        width = facts["width"] = entering.meta["shape"][channel]
        outside = outside_parts(calls, evidence)
        layers = read_layers(chosen, evidence, channel, width, outside)
    except Refused as refusal:
        refusal.facts = facts
        raise
    end = dict(calls[-1].outputs)[layers[-1].stream_out]
    stem, readout = stem_and_readout(evidence, calls, end, outside)
    return Anatomy(
        verdict=verdict(chosen, restricted=part or bool(others)),
        network=type(model).__name__,
        stack=chosen.container,
        layers=layers,
        calls=chosen.calls,
        width=width,
        streams=1,
        stream_shape=entering.meta["shape"],
        axes=Axes(evidence.batch_axis(entering), channel - len(entering.meta["shape"])),
        post_norm=any(layer.on_spine for layer in layers),
        stem=stem,
        readout=readout,
        head=find_head(evidence, end),
        inputs=named_inputs(inputs),
        tied=tied_parameters(model),
        left_out=chosen.left_out,
        outside=outside,
        notes=notes(chosen, others, layers, read_outside(calls, layers, evidence), evidence),
    )


def verdict(stack: Stack, *, restricted: bool) -> Verdict:
    if stack.calls > 1:
        return "looped"
    return "restricted" if restricted or stack.left_out else "accepted"


def named_inputs(inputs: Inputs) -> tuple[Input, ...]:
    return tuple(
        Input(name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    )


def tied_parameters(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names under which one parameter is registered more than once."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def inside(path: str, layers: tuple[str, ...]) -> bool:
    return any(path == layer or path.startswith(layer + ".") for layer in layers)


def notes(
    stack: Stack, others: list[Stack], layers: tuple[Layer, ...], tapped: list[str], evidence: Evidence
) -> tuple[str, ...]:
    found = []
    if stack.left_out:
        found.append(f"not part of the stack: {', '.join(stack.left_out)}")
    if tapped:
        found.append(
            f"the stream after {', '.join(tapped)} is also read outside of the layers: "
            "while a block runs, skipped layers give the stream as it came"
        )
    if others:
        found.append(f"other residual layers stay as they are: {'; '.join(other.summary() for other in others)}")
    inputs = dict.fromkeys(name for layer in layers for name in layer.conditioned_by)
    if inputs:
        found.append(f"already conditioned by {', '.join(inputs)}: its own modulation is kept, and nothing is injected")
    classes = {type(evidence.model.get_submodule(path)).__name__ for path, _ in stack.layers}
    if len(classes) > 1:
        found.append(f"layers of different classes: {', '.join(sorted(classes))}")
    return tuple(found)
