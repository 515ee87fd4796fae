"""A Diffusion Transformer in plain PyTorch (Peebles & Xie 2023): adaLN-zero, conditioned on a time and a class."""

import math

import torch
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """[N, T, width] by one vector an example, [N, width]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head self-attention: [N, T, width] -> [N, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.projection(mixed.transpose(1, 2).reshape(n, t, width))


class Layer(nn.Module):
    """adaLN-zero: shift, scale and gate of both branches come from the condition, and the gates start at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class TimeEmbedding(nn.Module):
    """[N] -> [N, width]: sines and cosines of the time, then an MLP."""

    def __init__(self, width: int, frequencies: int = 128) -> None:
        super().__init__()
        self.register_buffer("rates", torch.exp(-math.log(10_000) * torch.arange(frequencies) / frequencies))
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        angles = time.float()[:, None] * self.rates * 100
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class DiT(nn.Module):
    """Images [N, channels, size, size], times [N] and classes [N] to images.

    The table of classes has one row more than there are classes: the last stands for no class at all.
    """

    def __init__(
        self, *, size: int, patch: int, channels: int, classes: int, depth: int, width: int, heads: int
    ) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.time = TimeEmbedding(width)
        self.classes = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.classes.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, patch * patch * channels)
        for module in (self.modulation[1], self.head):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, time: Tensor, label: Tensor) -> Tensor:
        x = self.patches(images)
        n, _, rows, columns = x.shape
        x = x.flatten(2).transpose(1, 2) + self.positions
        condition = self.time(time) + self.classes(label)
        for layer in self.layers:
            x = layer(x, condition)
        shift, scale = self.modulation(condition).chunk(2, -1)
        x = self.head(modulate(self.norm(x), shift, scale))
        x = x.view(n, rows, columns, self.channels, self.patch, self.patch).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(n, self.channels, rows * self.patch, columns * self.patch)


def example_inputs() -> dict[str, Tensor]:
    """Two images of the digits' size, their times and classes."""
    return {"images": torch.randn(2, 1, 8, 8), "time": torch.rand(2), "label": torch.tensor([3, 7])}


def build_model() -> DiT:
    """6 layers for the 8 x 8 digits of scikit-learn."""
    return DiT(size=8, patch=2, channels=1, classes=10, depth=6, width=96, heads=4)
