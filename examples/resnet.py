"""A residual network with pre-activation (He et al. 2016, arXiv 1603.05027) whose last stage can be cut.

Its stages halve the picture and widen the features, so that no two of them are blocks of one shape. Within the last
one all residual blocks have one width: dbconvert split examples/resnet.py cuts these, the longest stage, and everything
before them is the stem. Norms are GroupNorm, since running statistics of BatchNorm would mix all noise levels.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """[N, width, H, W] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        return x + self.conv2(torch.relu(self.norm2(y)))


class ResNet(nn.Module):
    """Class scores of images: [N, channels, size, size] -> [N, classes].

    Args:
        widths: of each stage; every stage but the first halves height and width.
        depth: residual blocks of the last stage; the others have two.
    """

    def __init__(self, *, channels: int, classes: int, widths: tuple[int, ...], depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in pairwise(widths))
        depths = [2] * (len(widths) - 1) + [depth]
        self.stages = nn.ModuleList(
            nn.Sequential(*(Residual(width) for _ in range(count))) for width, count in zip(widths, depths, strict=True)
        )
        self.norm = nn.GroupNorm(8, widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages[0](self.stem(images))
        for down, stage in zip(self.downs, self.stages[1:], strict=True):
            x = stage(down(x))
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


def build_model() -> ResNet:
    """For the 8 x 8 digits of scikit-learn."""
    return ResNet(channels=1, classes=10, widths=(16, 32), depth=6)


def resnet_cifar100() -> ResNet:
    return ResNet(channels=3, classes=100, widths=(64, 128, 256), depth=6)
