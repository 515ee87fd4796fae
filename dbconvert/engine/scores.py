"""A network's scores behind its head: softcaps, scalings, and softmaxes, which become part of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from dbconvert.anatomy import Change, Head


def applied(change: Change, scores: Tensor) -> Tensor:
    """What follows a head, done to its result; a softmax as its logarithm."""
    if "softmax" in change.name:
        return scores.log_softmax(-1)
    if change.name == "tanh" or change.by is None:
        return scores.tanh()
    return scores * change.by if change.name == "multiply" else scores / change.by


def as_scores(head: Head, output: Tensor) -> Tensor:
    """A network's own output; of a softmax its logarithm."""
    if head.after[-1:] != (Change("softmax"),):
        return output
    return output.clamp_min(torch.finfo(output.dtype).tiny).log()
