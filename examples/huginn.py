"""A small recurrent-depth model (Huginn, Geiping et al. 2025): a prelude, a core that runs again and again on its own
state with the prelude's result beside it, and a coda. Pre-norm, rotary positions, attention that sees no later one.

dbconvert inspect examples/huginn.py
dbconvert train huginn_text_tiny
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


class Huginn(nn.Module):
    """Token numbers [N, S] to scores of the next token [N, S, vocabulary].

    Args:
        depths: layers of prelude, core and coda.
        iterations: how often the core runs.
    """

    def __init__(
        self, *, vocabulary: int, depths: tuple[int, int, int], width: int, heads: int, iterations: int
    ) -> None:
        super().__init__()
        self.iterations = iterations
        self.tokens = nn.Embedding(vocabulary, width)
        self.pairs = width // heads // 2
        self.prelude, self.core, self.coda = (
            nn.ModuleList(Layer(width, heads) for _ in range(depth)) for depth in depths
        )
        self.adapter = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.3)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        angles = self.angles(tokens.shape[1], tokens.device)
        for layer in self.prelude:
            x = layer(x, angles)
        state = torch.zeros_like(x)
        for _ in range(self.iterations):
            state = self.adapter(torch.cat([state, x], -1))
            for layer in self.core:
                state = layer(state, angles)
        for layer in self.coda:
            state = layer(state, angles)
        scores: Tensor = self.head(self.norm(state))
        return scores

    def angles(self, positions: int, device: torch.device) -> Tensor:
        frequencies = 1000.0 ** -(torch.arange(self.pairs, device=device) / self.pairs)
        return torch.arange(positions, device=device)[:, None] * frequencies


def build_model() -> nn.Module:
    return Huginn(vocabulary=128, depths=(1, 2, 1), width=96, heads=4, iterations=8)


def huginn_lm1b() -> nn.Module:
    """Of the DiffusionBlocks paper for LM1B, for a tokenizer of 32,000 tokens."""
    return Huginn(vocabulary=32_000, depths=(2, 4, 2), width=512, heads=8, iterations=32)


def example_inputs() -> dict[str, Tensor]:
    return {"tokens": torch.arange(2 * 32).view(2, 32) % 128}
