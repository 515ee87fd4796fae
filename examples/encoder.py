"""A small bidirectional Transformer for masked text: pre-norm, learnt positions, attention that begins near.

dbconvert inspect examples/encoder.py
dbconvert train mdm_text_tiny
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Every position sees every other, best around a place of each head's own: 1 before, 1 behind, 4 before, 4 behind.

    With most tokens hidden, content says nothing of where to look: without such slopes (ALiBi, with a side) training
    stays for long at the frequencies of the characters.
    """

    centres: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        pairs = torch.arange(heads) // 2
        side = torch.tensor([-1, 1]).repeat(heads)[:heads]
        self.register_buffer("centres", (side * 4**pairs)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        examples, positions, width = x.shape
        q, k, v = self.qkv(x).view(examples, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        places = torch.arange(positions, device=x.device)
        away = (places - places[:, None] - self.centres).abs()
        nearness = (-away / self.centres.abs())[None].to(x.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=nearness)
        out: Tensor = self.projection(mixed.transpose(1, 2).reshape(examples, positions, width))
        return out


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Token numbers [N, S] to scores of the token at every position [N, S, vocabulary]."""

    def __init__(self, *, vocabulary: int, positions: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.3)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(self.norm(x))
        return scores


def build_model() -> nn.Module:
    return Encoder(vocabulary=128, positions=64, depth=6, width=64, heads=4)


def example_inputs() -> dict[str, Tensor]:
    return {"tokens": torch.arange(2 * 32).view(2, 32) % 128}
