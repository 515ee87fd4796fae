"""The features of FID: Inception as torch-fidelity has it, with the weights of the first implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.errors import DBConvertError, UsageError

INCEPTION = "inception"
LAYER = "2048"
"""The pooled features, as many numbers a picture."""


class Inception(nn.Module):
    """Pictures [N, 3, H, W] in [0, 1] to features [N, 2048]; it resizes them itself, as the first implementation."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, pictures: Tensor) -> Tensor:
        found: Tensor = self.extractor((pictures.clamp(0, 1) * 255).round().to(torch.uint8))[0]
        return found


def open_inception() -> Inception:
    """Raises UsageError without torch-fidelity, DBConvertError where its weights cannot be had."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UsageError(
            "features of Inception need torch-fidelity and torchvision",
            why=str(error),
            hint="pip install 'dbconvert[fid]'",
        ) from None
    try:
        extractor: Any = FeatureExtractorInceptionV3("inception-v3-compat", [LAYER])
    except (OSError, RuntimeError) as error:
        raise DBConvertError(
            "the weights of Inception cannot be fetched",
            why=str(error).strip().split("\n", 1)[0],
            hint="torch-fidelity downloads them once into torch.hub's cache; check the connection",
        ) from None
    return Inception(extractor)
