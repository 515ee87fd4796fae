"""Pictures as tensors, and what happens to a training batch of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dbconvert.errors import DBConvertError
from dbconvert.recipe import DataOptions, ImageOptions, RandAugment

Augment = Callable[[Tensor], Tensor]


def to_image(value: Any, size: int | None) -> Tensor:
    """A picture as float [C, H, W] in [0, 1], resized to size x size; tensors of other kinds stay as they are."""
    if isinstance(value, Tensor):
        image = value.float() / 255 if value.dtype == torch.uint8 else value
    elif hasattr(value, "convert"):  # a PIL image
        image = torch.from_numpy(np.array(value if value.mode == "L" else value.convert("RGB"))).float() / 255
        image = image[None] if image.dim() == 2 else image.permute(2, 0, 1)
    else:
        array = np.asarray(value)
        image = torch.from_numpy(array.astype(np.float32) / 255 if array.dtype == np.uint8 else array)
    if size is not None and image.shape[-2:] != (size, size):
        image = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]
    return image


def normalise(images: Tensor, options: ImageOptions | None) -> Tensor:
    """(x - mean) / std a channel."""
    if options is None:
        return images
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (options.mean, options.std))
    return (images - mean) / std


def pixels(images: Tensor, options: ImageOptions | None) -> Tensor:
    """The way back from `normalise`, into [0, 1]."""
    if options is not None:
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (options.mean, options.std))
        images = images * std + mean
    return images.clamp(0, 1)


def augmentation(options: DataOptions) -> Augment:
    """What a training batch of pictures in [0, 1] goes through before it is normalised."""
    steps: list[Augment] = []
    if options.flip:
        steps.append(flip)
    if options.randaugment is not None:
        steps.append(randaugment(options.randaugment))

    def augment(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return augment


def flip(images: Tensor) -> Tensor:
    """Mirrors half of the pictures."""
    mirrored = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def randaugment(options: RandAugment) -> Augment:
    """kornia's RandAugment, on the device, a policy drawn for every picture."""
    try:
        from kornia.augmentation.auto import RandAugment as KorniaRandAugment
    except ImportError:
        raise DBConvertError("data.randaugment needs kornia", hint="pip install 'dbconvert[augment]'") from None
    policy = KorniaRandAugment(n=options.operations, m=options.magnitude)

    def augment(images: Tensor) -> Tensor:
        out: Tensor = policy(images)
        return out

    return augment
