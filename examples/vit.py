"""A pre-norm Vision Transformer in plain PyTorch (Dosovitskiy et al. 2021), for small images."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention: [N, T, width] -> [N, T, width]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.projection(mixed.transpose(1, 2).reshape(n, t, width))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Class scores of images: [N, channels, size, size] -> [N, classes]."""

    def __init__(
        self,
        *,
        size: int,
        patch: int,
        channels: int,
        classes: int,
        depth: int,
        width: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.5)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.5)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


def build_model() -> ViT:
    """6 layers for the 8 x 8 digits of scikit-learn."""
    return ViT(size=8, patch=2, channels=1, classes=10, depth=6, width=64, heads=4)


def vit_cifar100() -> ViT:
    """12 layers for CIFAR-100, as in the DiffusionBlocks paper."""
    return ViT(size=32, patch=4, channels=3, classes=100, depth=12, width=128, heads=4, dropout=0.1)


def vit_tiny_imagenet() -> ViT:
    """12 layers, 768 wide, for the 64 x 64 pictures of Tiny-ImageNet."""
    return ViT(size=64, patch=8, channels=3, classes=200, depth=12, width=768, heads=12, dropout=0.1)
