"""Where the noisy label of a classifier enters and what its head reads: found by trying, or as it was asked for."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from dbconvert.anatomy import Anatomy, Axes
from dbconvert.errors import UsageError
from dbconvert.graph.placing import last_everywhere, mean_of_others, tried, without_last
from dbconvert.plan import Entry, Readout, Target
from dbconvert.tasks.base import Change

TOKENS = 3
"""Axes of a stream of tokens."""


def own_token(anatomy: Anatomy) -> int | None:
    """The token that the head reads, where the stream has positions."""
    return anatomy.head.token if anatomy.head is not None and len(anatomy.stream_shape) == TOKENS else None


def placed(
    target: Target, anatomy: Anatomy, model: nn.Module | None, entry: Entry | None, readout: Readout | None
) -> Target:
    """The target with its placement and readout.

    Raises:
        UsageError: what was asked for cannot be had; the message says why.
    """
    reading = readout or ("pooled" if target.token is None else "token")
    if entry is None:
        entry = found_entry(target, anatomy, model, reading)
    else:
        refuse_entry(entry, target, anatomy, model, reading)
    if readout == "token" and entry == "add" and target.token is None:
        raise UsageError(
            "split.readout=token reads the token where the label enters or the class token, and there is neither",
            hint="leave it out: the head reads what the network pools",
        )
    parameter = class_token(target, anatomy, model) if entry == "replace" else None
    return replace(target, placement=entry, parameter=parameter, readout=reading)


def found_entry(target: Target, anatomy: Anatomy, model: nn.Module | None, readout: Readout) -> Entry:
    """At the class token where the head reads one; as one token more where every layer takes it; else everywhere."""
    if target.token is not None:
        return "token"
    return "append" if no_room(anatomy, model, readout) is None else "add"


def refuse_entry(entry: Entry, target: Target, anatomy: Anatomy, model: nn.Module | None, readout: Readout) -> None:
    why = None
    if entry in ("replace", "token") and target.token is None:
        why = "the head reads no single token"
    elif entry == "replace" and class_token(target, anatomy, model) is None:
        shape = [1, 1, anatomy.width]
        why = f"token {target.token} is not one parameter of shape {shape} that each example can have its own of"
    elif entry == "append":
        why = no_room(anatomy, model, readout)
    if why is not None:
        raise UsageError(
            f"the noisy label cannot enter by split.entry={entry}",
            why=why,
            hint="leave it out: the analysis finds one that fits",
        )


def no_room(anatomy: Anatomy, model: nn.Module | None, readout: Readout) -> str | None:
    """Why one token more does not fit; None if it does."""
    if len(anatomy.stream_shape) != TOKENS:
        return f"the stream has no positions: it is {list(anatomy.stream_shape)}"
    if model is None:
        return "it has to be tried, and the network is too large to be built and has no twin"
    with tried(model, anatomy) as placing:
        return placing.no_room(read=readout == "token")


def class_token(target: Target, anatomy: Anatomy, model: nn.Module | None) -> str | None:
    """The parameter that the class token begins as; None if there is none, or nothing to try it on."""
    if model is None or target.token is None:
        return None
    with tried(model, anatomy) as placing:
        return placing.class_token(target.token)


def reading(target: Target, axes: Axes) -> Change | None:
    """What happens to the stream as it leaves the layers, so that the head reads what it should."""
    appended, pooled, token = target.placement == "append", target.readout == "pooled", target.token

    def leave(stream: Tensor) -> Tensor:
        if appended and not pooled:
            return last_everywhere(stream, axes)
        stream = without_last(stream, axes) if appended else stream
        return mean_of_others(stream, token, axes) if pooled and token is not None else stream

    return leave if appended or (pooled and token is not None) else None


def in_words(target: Target) -> str:
    """For people; empty where the task leaves no choice."""
    if target.readout is None:
        return ""
    enters = {
        "replace": f"the noisy label enters in the place of token {target.token} ({target.parameter})",
        "token": f"the noisy label is added to token {target.token}",
        "append": "the noisy label enters as one token more",
        "add": "the noisy label is added at every position",
    }[target.placement]
    own = "the token of the label" if target.placement == "append" else f"token {target.token}"
    others = " other" if target.placement == "append" else ""
    reads = own if target.readout == "token" else f"what all{others} positions are pooled to"
    return f"{enters}; the head reads {reads}"
