"""DiT-S/2 (Peebles & Xie 2023, table 1) on the 32 x 32 images of CIFAR-10, as in the DiffusionBlocks paper."""

import torch
from dit import DiT
from torch import Tensor


def example_inputs() -> dict[str, Tensor]:
    """Two images, their times and classes."""
    return {"images": torch.randn(2, 3, 32, 32), "time": torch.rand(2), "label": torch.tensor([3, 7])}


def build_model() -> DiT:
    return DiT(size=32, patch=2, channels=3, classes=10, depth=12, width=384, heads=6)
