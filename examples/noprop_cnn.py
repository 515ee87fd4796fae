"""A convolutional classifier in the manner of NoProp (Li, Teh and Pascanu 2025, arXiv 2503.24322), for CIFAR-100.

What is known of the network: NoProp's blocks take the picture through convolutions and the noisy label embedding
through linear layers, join both and predict the label. The DiffusionBlocks paper trains such a network in three blocks
(overlap 0.1, AdamW 1e-4, 1000 epochs: 46.88 % against 47.80 % by backpropagation) without giving its layers. This one
has the same ingredients in a form that can be cut: convolutions with pooling make features of the picture, residual
blocks of one width refine them, and the label's embedding becomes a bias on every channel. Depth and width are a
choice. Norms are GroupNorm where noise has been: running statistics of BatchNorm would mix all levels.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))): [N, width, H, W] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.norm2(self.conv1(torch.relu(self.norm1(x))))))


class NoPropCNN(nn.Module):
    """Class scores of images: [N, channels, size, size] -> [N, classes]."""

    def __init__(self, *, channels: int, classes: int, width: int, depth: int, poolings: int) -> None:
        super().__init__()
        widths = [channels, *(width // 2**i for i in range(poolings - 1, -1, -1))]
        stem: list[nn.Module] = []
        for before, after in pairwise(widths):
            stem += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.stem = nn.Sequential(*stem)
        self.layers = nn.ModuleList(Residual(width) for _ in range(depth))
        self.norm = nn.GroupNorm(8, width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


def build_model() -> NoPropCNN:
    """For CIFAR-100: two poolings, six residual blocks on 8 x 8 features."""
    return NoPropCNN(channels=3, classes=100, width=256, depth=6, poolings=2)


def noprop_digits() -> NoPropCNN:
    """For the 8 x 8 digits of scikit-learn."""
    return NoPropCNN(channels=1, classes=10, width=32, depth=3, poolings=1)
