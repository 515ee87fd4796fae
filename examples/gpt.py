"""A small GPT: pre-norm, rotary positions, attention that sees no later one. Made for bytes or characters.

dbconvert inspect examples/gpt.py
dbconvert train ar_text_tiny
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): pairs of channels of x [N, heads, S, d], turned by angles [S, d / 2]."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        examples, positions, width = x.shape
        q, k, v = self.qkv(x).view(examples, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(turned(q, angles), turned(k, angles), v, is_causal=True)
        out: Tensor = self.projection(mixed.transpose(1, 2).reshape(examples, positions, width))
        return out


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Token numbers [N, S] to scores of the next token [N, S, vocabulary]."""

    def __init__(self, *, vocabulary: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.pairs = width // heads // 2
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.3)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        angles = self.angles(tokens.shape[1], tokens.device)
        for layer in self.layers:
            x = layer(x, angles)
        scores: Tensor = self.head(self.norm(x))
        return scores

    def angles(self, positions: int, device: torch.device) -> Tensor:
        frequencies = 1000.0 ** -(torch.arange(self.pairs, device=device) / self.pairs)
        return torch.arange(positions, device=device)[:, None] * frequencies


def build_model() -> nn.Module:
    return GPT(vocabulary=128, depth=6, width=96, heads=4)


def example_inputs() -> dict[str, Tensor]:
    return {"tokens": torch.arange(2 * 32).view(2, 32) % 128}
