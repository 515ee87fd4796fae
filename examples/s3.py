"""A causal convolutional network for word problems: at every position the product of all group elements up to it.

dbconvert inspect examples/s3.py
dbconvert train s3

A layer sees its position and the two before it, so that an answer at position i needs i / 2 layers or so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """x + f(norm(x)), f a causal convolution of kernel 3 and a linear: [N, S, width] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.near = nn.Conv1d(width, 3 * width, 3)
        self.out = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(self.norm(x).transpose(1, 2), (2, 0))
        out: Tensor = self.out(F.gelu(self.near(before)).transpose(1, 2))
        return x + out


class CausalCNN(nn.Module):
    """Elements [N, S] to scores of the product at every position [N, S, elements]."""

    def __init__(self, *, elements: int, depth: int, width: int) -> None:
        super().__init__()
        self.elements = nn.Embedding(elements, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, elements)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.elements(tokens)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(self.norm(x))
        return scores


def build_model() -> nn.Module:
    """The symmetric group S3 has six elements."""
    return CausalCNN(elements=6, depth=6, width=64)


def example_inputs() -> dict[str, Tensor]:
    return {"tokens": torch.arange(2 * 12).view(2, 12) % 6}
