"""Which part of a tensor a slice is, and what of a concatenation lies there."""

import pytest
import torch
from torch import nn

from dbconvert.graph.pieces import joined_at, piece
from dbconvert.graph.tape import record


class Cuts(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def forward(self, x, y):
        return self.cut(torch.cat([x, y], dim=1) + 1)


CUTS = {
    "head": (lambda both: both[:, :2], 0, 2),
    "by a list": (lambda both: both[:, [0, 1]], 0, 2),
    "tail": (lambda both: both[:, 2:, ...], 2, 3),
    "from the end": (lambda both: both[:, -3:], 2, 3),
    "narrow": (lambda both: both.narrow(1, 1, 2), 1, 2),
    "split": (lambda both: both.split([2, 3], dim=1)[1], 2, 3),
    "chunk": (lambda both: torch.chunk(both, 2, 1)[1], 3, 2),
}
NO_PIECES = {
    "empty": lambda both: both[:, :0],
    "strided": lambda both: both[:, ::2],
    "two axes": lambda both: both[:, :2, :2],
    "one entry": lambda both: both[:, 0],
    "by a tensor": lambda both: both[:, torch.tensor([0, 1])],
    "all": lambda both: both[:, :5],
}


def recorded(cut):
    """The recorded result of a cut, and the concatenation."""
    recording = record(Cuts(cut), (torch.zeros(2, 2, 4), torch.zeros(2, 3, 4)), {})
    join = next(node for node in recording.graph.nodes if getattr(node.target, "__name__", "") == "cat")
    return recording.outputs[0][1], join, dict(recording.inputs)


@pytest.mark.parametrize("name", CUTS)
def test_pieces(name):
    cut, start, length = CUTS[name]
    node, join, given = recorded(cut)
    found = piece(node)
    assert (found.axis, found.start, found.length) == (1, start, length)
    there = {(0, 2): given[(0,)], (2, 3): given[(1,)]}
    assert joined_at(join, found) is there.get((start, length))


@pytest.mark.parametrize("name", NO_PIECES)
def test_no_pieces(name):
    node, _, _ = recorded(NO_PIECES[name])
    assert piece(node) is None
