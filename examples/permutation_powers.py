"""An attention network for the powers of a permutation f: at every point i all of f^j(i), j from 1 to 8.

dbconvert inspect examples/permutation_powers.py
dbconvert train permutation_powers

Every position knows its point and where f takes it. A position that knows f^j of its point finds f^2j where that point
knows as much, so that a layer of attention can double what the one before it found.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """[N, S, width] -> the same; all positions see each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        examples, positions, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(examples, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.projection(mixed.transpose(1, 2).reshape(examples, positions, width))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Powers(nn.Module):
    """f(i) at position i, [N, n], to scores [N, n, p, n] of f^j(i), j from 1 to p; or [N, n, n] of one power."""

    def __init__(self, *, points: int, powers: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.count = powers
        self.points = nn.Embedding(points, width)
        self.image = nn.Linear(width, width, bias=False)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, powers * points)

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.image(self.points(tokens)) + self.points.weight[place]
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(self.norm(x))
        return scores.unflatten(-1, (self.count, -1)) if self.count > 1 else scores


def build_model() -> nn.Module:
    """All eight powers of permutations of 16 points."""
    return Powers(points=16, powers=8, depth=6, width=64, heads=4)


def highest_power() -> nn.Module:
    """One power of them, for `data.puzzle.single=true`: the eighth."""
    return Powers(points=16, powers=1, depth=6, width=64, heads=4)


def example_inputs() -> dict[str, Tensor]:
    return {"tokens": torch.arange(2 * 16).view(2, 16) % 16}
