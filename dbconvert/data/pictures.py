"""Pictures that lie decoded in memory, a byte a colour value, with their labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

LARGEST = 4 * 2**30
"""Bytes of decoded pictures that are kept."""


class Pictures(Dataset[dict[str, Tensor]]):
    """Items {image: [C, H, W], label}.

    Args:
        images: [N, C, H, W], uint8, or floating in [0, 1].
        labels: [N] long.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def resized(self, size: int | None, *, crop: bool = False) -> Pictures:
        """The same, size x size; `crop` takes the squares in the middle first."""
        if crop:
            return Pictures(middle(self.images), self.labels).resized(size)
        if size is None or self.images.shape[-2:] == (size, size):
            return self
        images = F.interpolate(self.images.float(), (size, size), mode="bilinear", antialias=True)
        return Pictures(images.round().to(torch.uint8) if self.images.dtype == torch.uint8 else images, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}


def middle(images: Tensor) -> Tensor:
    """The largest squares in the middle of images [..., H, W]."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


class Kept:
    """What pictures were decoded to, so that each is decoded once: those of one shape, where all take LARGEST bytes at
    most together.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.images: Tensor | None = None
        self.labels = torch.zeros(count, dtype=torch.long)
        self.there = torch.zeros(count, dtype=torch.bool)

    def get(self, index: int) -> tuple[Tensor, Tensor] | None:
        """The picture, uint8, and its label, if they are kept."""
        if self.images is None or not self.there[index]:
            return None
        return self.images[index], self.labels[index]

    def put(self, index: int, image: Tensor, label: Tensor) -> None:
        if image.dtype != torch.uint8 or image.numel() * self.count > LARGEST:
            return
        if self.images is None:
            self.images = torch.empty(self.count, *image.shape, dtype=torch.uint8)
        if image.shape == self.images.shape[1:]:
            self.images[index], self.labels[index], self.there[index] = image, label, True
