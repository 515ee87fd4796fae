"""Pictures as tensors, and what happens to a training batch of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dbconvert.data.pictures import middle
from dbconvert.data.randaugment import LARGEST, randaugment
from dbconvert.data_options import DataOptions, ImageOptions, Mode
from dbconvert.errors import DBConvertError, UsageError

Augment = Callable[[Tensor], Tensor]
PICTURES, POSTERIOR = 4, 6
"""Axes of a batch of pictures, and of one of posteriors of latents."""
DEEP = ("I", "F")
"""Beginnings of PIL's modes with more than 8 bits a value."""


def to_image(value: Any, size: int | None, mode: Mode | None = None, *, crop: bool = False) -> Tensor:
    """A picture as float [C, H, W] in [0, 1], resized to size x size; tensors of other kinds stay as they are.

    Args:
        crop: only the largest square in its middle.
    """
    return unit(to_picture(value, size, mode, crop=crop))


def to_picture(value: Any, size: int | None, mode: Mode | None = None, *, crop: bool = False) -> Tensor:
    """The same with a byte a value where the picture has that: uint8, else as it is."""
    if isinstance(value, Tensor):
        image = value
    elif hasattr(value, "convert"):  # a PIL image
        image = pixels(value, mode)
    else:
        array = np.asarray(value)
        image = torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.float32, copy=False))
    image = middle(image) if crop and image.dim() == 3 else image
    return image if size is None else resized(image[None], size)[0]


def resized(images: Tensor, size: int) -> Tensor:
    """[N, C, H, W] -> [N, C, size, size]; bytes become bytes."""
    if images.shape[-2:] == (size, size):
        return images
    found = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return found.round().to(torch.uint8) if images.dtype == torch.uint8 else found


def pixels(picture: Any, mode: Mode | None) -> Tensor:
    """A PIL image as uint8 [C, H, W]: grey ones with one channel and others with three, or all as `mode` says.

    Raises:
        DBConvertError: it has more than 8 bits a value, which a conversion would cut off.
    """
    if picture.mode.startswith(DEEP):
        raise DBConvertError(
            f"a picture has mode {picture.mode}, which is more than 8 bits a value",
            hint="convert it to 8 bits, or give tensors from a file.py:function",
        )
    wanted = mode or ("L" if picture.mode == "L" else "RGB")
    array = np.array(picture if picture.mode == wanted else picture.convert(wanted))
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def unit(images: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1]; others stay as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def normalise(images: Tensor, options: ImageOptions | None) -> Tensor:
    """(x - mean) / std a channel."""
    if options is None:
        return images
    mean, std = (channels(values, images.dtype, images.device) for values in (options.mean, options.std))
    return (images - mean) / std


@lru_cache
def channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number a channel, [C, 1, 1], of use in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def entering(value: Tensor, options: ImageOptions | None, augment: Augment | None = None) -> Tensor:
    """What a batch holds, as the network takes it: pictures augmented and normalised, posteriors of latents drawn."""
    if value.dim() == POSTERIOR:
        return drawn(value)
    if value.dim() != PICTURES:
        return value
    return normalise(value if augment is None else augment(value), options)


def drawn(posteriors: Tensor) -> Tensor:
    """Latents [N, C, H, W] drawn from posteriors [N, V, 2, C, H, W], of one of the V views of a picture each."""
    views = torch.randint(posteriors.shape[1], (len(posteriors),), device=posteriors.device)
    mean, std = posteriors[torch.arange(len(posteriors), device=posteriors.device), views].unbind(1)
    return mean + std * torch.randn_like(mean)


def denormalise(images: Tensor, options: ImageOptions | None) -> Tensor:
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
    policy = options.randaugment
    if policy is not None and policy.magnitude > LARGEST:
        raise UsageError(f"data.randaugment.magnitude is {policy.magnitude}, and {LARGEST} is the largest")
    if policy is not None:
        steps.append(lambda images: randaugment(images, policy.operations, policy.magnitude))

    def augment(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return augment


def flip(images: Tensor) -> Tensor:
    """Mirrors half of the pictures."""
    mirrored = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)
