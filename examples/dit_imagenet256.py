"""DiT-L/2 (Peebles & Xie 2023, table 1) on latents of 256 x 256 images, as in the DiffusionBlocks paper."""

import torch
from dit import DiT
from torch import Tensor


def example_inputs() -> dict[str, Tensor]:
    """Latents of two images, of a VAE that makes 4 channels of an eighth of the size, their times and classes."""
    return {"images": torch.randn(2, 4, 32, 32), "time": torch.rand(2), "label": torch.tensor([3, 7])}


def build_model() -> DiT:
    return DiT(size=32, patch=2, channels=4, classes=1000, depth=24, width=1024, heads=16)
