"""The built-in `digits`: 1,797 images of 8 x 8 pixels that ship with scikit-learn, in fixed parts."""

from __future__ import annotations

import torch

from dbconvert.data.pictures import Pictures

PARTS = {"train": (0, 1197), "validation": (1197, 1497), "test": (1497, 1797)}
ORDER_SEED = 0


class Digits(Pictures):
    """One part: items {image: [1, 8, 8] in [0, 1], label: 0..9}. Parts are slices of one fixed random order."""

    def __init__(self, part: str) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(ORDER_SEED))
        chosen = order[slice(*PARTS[part])]
        images = torch.as_tensor(pixels, dtype=torch.float32)[chosen].view(-1, 1, 8, 8) / 16
        super().__init__(images, torch.as_tensor(labels)[chosen].long())
