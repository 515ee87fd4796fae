"""A local convolutional network for cellular automata: all cells of a ring some steps later, at once.

dbconvert inspect examples/automaton.py
dbconvert train automaton

A layer sees a cell and its two neighbours, as one step of the automaton does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """x + f(norm(x)), f a convolution of kernel 3 around the ring and a linear: [N, S, width] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.near = nn.Conv1d(width, 3 * width, 3)
        self.out = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        ring = F.pad(self.norm(x).transpose(1, 2), (1, 1), mode="circular")
        out: Tensor = self.out(F.gelu(self.near(ring)).transpose(1, 2))
        return x + out


class RingCNN(nn.Module):
    """Cells [N, S] to scores of every cell's later state [N, S, 2].

    Args:
        symbols: a cell is 0 or 1, or also tells by how many steps later.
    """

    def __init__(self, *, symbols: int, depth: int, width: int) -> None:
        super().__init__()
        self.cells = nn.Embedding(symbols, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.cells(tokens)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(self.norm(x))
        return scores


def build_model() -> nn.Module:
    """For a fixed number of steps: data.source=automaton."""
    return RingCNN(symbols=2, depth=6, width=64)


def mixed_steps() -> nn.Module:
    """For one to six steps, which the cells tell: data.puzzle.steps=[1,6]."""
    return RingCNN(symbols=12, depth=6, width=64)


def example_inputs() -> dict[str, Tensor]:
    return {"tokens": torch.arange(2 * 24).view(2, 24) % 2}
