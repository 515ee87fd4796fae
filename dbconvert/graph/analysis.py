"""From a network and an example input to its Anatomy, or to a refusal that names the node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dbconvert.anatomy import Adapter, Anatomy, Verdict
from dbconvert.errors import Refused
from dbconvert.graph.adapted import adapted_calls, adapted_layers, stream_of
from dbconvert.graph.around import around_layers, is_around, part_calls, stream_before
from dbconvert.graph.diagnosis import changing_stages, why_no_stack
from dbconvert.graph.evidence import Evidence, refuse_divergence
from dbconvert.graph.layers import entry, layer_calls, outside_parts, read_layers, read_outside
from dbconvert.graph.parts import StackFacts, batched, surroundings
from dbconvert.graph.spine import find_spines
from dbconvert.graph.stack import Stack, choose_stack, refuse_decisions, wanted_stack
from dbconvert.graph.streams import feeding_loops
from dbconvert.graph.tape import Recording, record

Inputs = dict[str, Any]
"""Arguments of the network's forward by name."""
ONE_BATCH_SIZE = "the network runs one batch size only, so the batch axis is taken to be the first"

CHOICES = ("several-stacks", "dimensions")
"""Refusals that leave the choice of a stack to the user."""
ADAPTABLE = ("not-residual", "functional")
"""Refusals of layers that may keep the shape all the same, which an adapter can say of layers that are called."""


def analyse(
    model: nn.Module, inputs: Inputs, *, stack: str | None = None, adapter: Adapter | None = None, grow: bool = True
) -> Anatomy:
    """Finds the residual stack of a network and everything needed to cut it.

    Args:
        model: any module; it is put into eval mode for the recording and back afterwards.
        inputs: arguments of its forward, batch first, at least one example.
        stack: path of the module that holds the layers, when there are several.
        adapter: says what the layers are, where the graph does not show it.
        grow: record a larger batch too, which tells the batch axis; else it is taken to be the first.

    Raises:
        Refused: the network cannot be cut; the error names the node and the reason.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        evidence = gather(model, inputs, grow)
        anatomy = read(evidence, inputs, stack) if adapter is None else read_adapted(evidence, inputs, adapter)
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
    return {name: torch.cat([v, v[:1]]) if batched(v, inputs) else v for name, v in inputs.items()}


def read(evidence: Evidence, inputs: Inputs, wanted: str | None) -> Anatomy:
    """The anatomy of the stack that is wanted, or of the one there is.

    Raises:
        Refused: with a hint that names the parts that would convert, when none was wanted.
    """
    stacks = evidence.stacks
    try:
        if not stacks:
            raise why_no_stack(evidence)
        chosen = choose_stack(stacks, wanted, evidence.model)
        changing = changing_stages(evidence, chosen)
        if changing is not None and wanted is None:
            raise changing
        return read_stack(evidence, inputs, chosen, stacks, part=changing is not None)
    except Refused as refusal:
        if wanted is not None:
            raise
        told = feeding_loops(evidence) or refusal
        offer(told, evidence, inputs, stacks)
        raise told from None


def offer(refusal: Refused, evidence: Evidence, inputs: Inputs, stacks: list[Stack]) -> None:
    """Adds to a refusal which parts of the network would convert: other stacks, or all layers but the first or last."""
    container = stacks[0].container if stacks else ""
    others = [stack.container for stack in stacks if stack is not stacks[0]]
    named = [container, *others] if refusal.kind in CHOICES else [f"{container}[1:]", f"{container}[:-1]", *others]
    found = []
    for wanted in named if stacks else ():
        try:
            found.append((wanted, read_stack(evidence, inputs, wanted_stack(stacks, wanted, evidence.model), stacks)))
        except Refused:
            continue
    if found:
        parts = "; ".join(f"--stack {wanted} ({part.depth} layers)" for wanted, part in found)
        kept = "" if refusal.kind in CHOICES or not refusal.hint else f"{refusal.hint}; or "
        refusal.hint = f"{kept}convert a part: {parts}"
    elif refusal.kind in ADAPTABLE and all(evidence.recording.calls_of(p) for s in stacks[:1] for p, _ in s.layers):
        refusal.hint += "; or name the layers yourself with adapter() in a model.py (docs/will-it-convert.md)"
    refusal.facts["stacks"] = [wanted for wanted, _ in found]


def read_stack(evidence: Evidence, inputs: Inputs, chosen: Stack, stacks: list[Stack], *, part: bool = True) -> Anatomy:
    """The anatomy of a network whose layers are those of `chosen`.

    Args:
        part: the network has more to it than this stack.
    """
    recording = evidence.recording
    paths = tuple(path for path, _ in chosen.layers)
    others = [stack for stack in stacks if not any(inside(path, paths) for path, _ in stack.layers)]
    strays = stray_layers(evidence, [*chosen.left_out, *paths, *(path for s in others for path, _ in s.layers)], paths)
    refuse_decisions(recording, paths)
    facts: dict[str, object] = {"stack": chosen.container, "layers": len(paths), "calls": chosen.calls}
    try:
        read = read_around if is_around(chosen, evidence) else read_called
        found = read(chosen, evidence)
    except Refused as refusal:
        refusal.facts = facts
        raise
    return Anatomy(
        verdict=verdict(chosen, restricted=part or bool(others or strays)),
        stack=chosen.container,
        calls=chosen.calls,
        left_out=(*chosen.left_out, *strays),
        notes=notes((*chosen.left_out, *strays), others, found),
        **surroundings(evidence, inputs, found),
    )


def read_called(stack: Stack, evidence: Evidence) -> StackFacts:
    """Layers that are modules called in a row."""
    calls = layer_calls(stack, evidence)
    refuse_divergence(evidence, {call.order for call in calls})
    _, entering, _ = entry(calls[0], stack.layers[0][1][0], evidence)
    channel = evidence.channel_axis(entering)
    outside = outside_parts(calls, evidence)
    layers = read_layers(stack, evidence, channel, entering.meta["shape"][channel], outside)
    end = dict(calls[-1].outputs)[layers[-1].stream_out]
    return StackFacts(layers, entering, end, outside, tuple(read_outside(calls, layers, stack.join)))


def read_around(stack: Stack, evidence: Evidence) -> StackFacts:
    """Layers whose additions are written around their modules."""
    calls = part_calls(stack, evidence)
    everyone = [call for own in calls for call in own]
    refuse_divergence(evidence, {call.order for call in everyone})
    refuse_decisions(evidence.recording, tuple(call.path for call in everyone))
    entering = stream_before(stack.layers[0][1][0])
    axes = evidence.axes(entering)
    outside = outside_parts(everyone, evidence)
    layers = around_layers(stack, calls, evidence, axes, entering.meta["shape"][axes.channel], outside)
    return StackFacts(layers, entering, stack.layers[-1][1][-1].node, outside, ())


def read_adapted(evidence: Evidence, inputs: Inputs, adapter: Adapter) -> Anatomy:
    """The anatomy of a network whose layers an adapter names."""
    calls = adapted_calls(adapter, evidence)
    orders = {call.order for call in calls}
    refuse_divergence(evidence, orders)
    refuse_decisions(evidence.recording, tuple(call.path for call in calls))
    entering, _ = stream_of(adapter, calls[0])
    channel = evidence.channel_axis(entering)
    outside = outside_parts(calls, evidence)
    layers = adapted_layers(adapter, calls, evidence, channel, entering.meta["shape"][channel], outside)
    end = dict(calls[-1].outputs)[layers[-1].stream_out]
    found = StackFacts(layers, entering, end, outside, tuple(read_outside(calls, layers)))
    whole = [layer.path for layer in layers if layer.branches[0].placement == "layer"]
    told = (f"conditioned as a whole, since they show no residual branches: {', '.join(whole)}",) if whole else ()
    return Anatomy(
        verdict="accepted",
        stack=", ".join(adapter.layers),
        calls=1,
        notes=(*told, *notes((), [], found)),
        **surroundings(evidence, inputs, found),
    )


def stray_layers(evidence: Evidence, known: list[str], layers: tuple[str, ...]) -> tuple[str, ...]:
    """Called modules of a layer's own class that are in no stack, as the second half of a network with long skips."""
    model = evidence.model
    classes = {type(model.get_submodule(path)) for path in layers}
    own = tuple(cls for cls in classes if not cls.__module__.startswith("torch."))
    called = dict.fromkeys(call.path for call in evidence.recording.calls if call.path)
    return tuple(p for p in called if type(model.get_submodule(p)) in own and not inside(p, tuple(known)))


def verdict(stack: Stack, *, restricted: bool) -> Verdict:
    if stack.calls > 1:
        return "looped"
    return "restricted" if restricted or stack.left_out else "accepted"


def inside(path: str, layers: tuple[str, ...]) -> bool:
    return any(path == layer or path.startswith(layer + ".") for layer in layers)


def notes(left_out: tuple[str, ...], others: list[Stack], facts: StackFacts) -> tuple[str, ...]:
    found = []
    if left_out:
        found.append(f"not part of the stack: {', '.join(left_out)}")
    if facts.tapped:
        found.append(
            f"the stream after {', '.join(facts.tapped)} is also read outside of the layers: "
            "while a block runs, skipped layers give the stream as it came"
        )
    if others:
        found.append(f"other residual layers stay as they are: {'; '.join(other.summary() for other in others)}")
    inputs = dict.fromkeys(name for layer in facts.layers for name in layer.conditioned_by)
    if inputs:
        found.append(f"already conditioned by {', '.join(inputs)}: its own modulation is kept, and nothing is injected")
    classes = {layer.type for layer in facts.layers}
    if len(classes) > 1:
        found.append(f"layers of different classes: {', '.join(sorted(classes))}")
    return tuple(found)
