"""A Llama without its causal mask: RMSNorm, rotary positions, SwiGLU, every position sees every other.

dbconvert inspect examples/rotary_encoder.py
dbconvert train mdm_text8
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): pairs of channels of x [N, heads, S, d], turned by angles [S, d / 2]."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        examples, positions, width = x.shape
        q, k, v = self.qkv(x).view(examples, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(turned(q, angles), turned(k, angles), v)
        out: Tensor = self.projection(mixed.transpose(1, 2).reshape(examples, positions, width))
        return out


class SwiGLU(nn.Module):
    """Shazeer 2020; `inner` is 8 / 3 of the width, so that it has the parameters of an ordinary MLP of 4 widths."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, heads)
        self.mlp = SwiGLU(width, 8 * width // 3)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))


class RotaryEncoder(nn.Module):
    """Token numbers [N, S] to scores of the token at every position [N, S, vocabulary]."""

    def __init__(self, *, vocabulary: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.pairs = width // heads // 2
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        angles = self.angles(tokens.shape[1], tokens.device)
        for layer in self.layers:
            x = layer(x, angles)
        scores: Tensor = self.head(self.norm(x))
        return scores

    def angles(self, positions: int, device: torch.device) -> Tensor:
        frequencies = 10000.0 ** -(torch.arange(self.pairs, device=device) / self.pairs)
        return torch.arange(positions, device=device)[:, None] * frequencies


def build_model() -> nn.Module:
    return RotaryEncoder(vocabulary=256, depth=12, width=768, heads=12)


def example_inputs() -> dict[str, Tensor]:
    return {"tokens": torch.arange(2 * 32).view(2, 32)}
