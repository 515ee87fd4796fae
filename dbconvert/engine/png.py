"""Images as PNG files, one by one and as a grid."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

GAP = 2
"""Pixels between the images of a grid, and around them."""


def write_png(path: Path, image: Tensor) -> None:
    """Writes one image [C, H, W] of numbers in [0, 1], C = 1 (grey) or 3."""
    from PIL import Image

    levels = (image * 255).round().to(torch.uint8)
    array = levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(array).save(path, format="PNG")


def write_grid(path: Path, images: Tensor, columns: int) -> None:
    """Writes images [N, C, H, W] side by side, row by row, on white."""
    rows = -(-len(images) // columns)
    padded = F.pad(images, (0, GAP, 0, GAP), value=1.0)
    missing = padded.new_ones(rows * columns - len(images), *padded.shape[1:])
    channels, height, width = padded.shape[1:]
    sheet = torch.cat([padded, missing]).view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    write_png(path, F.pad(sheet.reshape(channels, rows * height, columns * width), (GAP, 0, GAP, 0), value=1.0))
