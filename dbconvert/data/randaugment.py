"""RandAugment (Cubuk et al. 2020) of a batch at once, on its device: every picture draws its own operations.

Pictures are [N, C, H, W] in [0, 1], grey or colour. Operations and magnitudes are those of the paper and of
torchvision; what PIL computes on bytes is computed on bytes' values. No operation waits for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "colour", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
LARGEST = 30
SHEAR, TRANSLATE, ROTATE, BLEND, BITS = 0.3, 150 / 331, math.radians(30), 0.9, 4
"""What magnitude 30 is: a slope, a share of the size, an angle, a distance from the picture, bits that are dropped."""
GREY = (0.299, 0.587, 0.114)
LEVELS = 256


def randaugment(images: Tensor, operations: int, magnitude: int) -> Tensor:
    """So many operations one after the other, of magnitude 0 to 30; half of the signs are turned."""
    for _ in range(operations):
        chosen = torch.randint(len(OPERATIONS), (len(images),), device=images.device)
        sign = torch.randint(2, (len(images),), device=images.device) * 2 - 1
        images = operate(images, chosen, sign * (magnitude / LARGEST))
    return images


def operate(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """One operation a picture.

    On a CPU each runs on the pictures that drew it; elsewhere on all, as finding those would wait for the device.

    Args:
        chosen: indices of OPERATIONS, [N].
        strength: [N] in [-1, 1]; operations without a direction take its size.
    """
    found = images.clone()
    for names, act in KINDS.items():
        asked = sum((chosen == OPERATIONS.index(name) for name in names), torch.zeros_like(chosen, dtype=torch.bool))
        if images.device.type == "cpu":
            own = asked.nonzero()[:, 0]
            if len(own):
                found[own] = act(images[own], chosen[own], strength[own])
        else:
            found = torch.where(asked[:, None, None, None], act(images, chosen, strength), found)
    return found


def moved(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """Sheared, translated or rotated about the centre, the nearest pixel taken, black where there was none."""

    def of(name: str) -> Tensor:
        return (chosen == OPERATIONS.index(name)) * strength

    height, width = images.shape[-2:]
    angle = of("rotate") * ROTATE
    cos, sin = angle.cos(), angle.sin()
    rows = [
        # grid_sample's coordinates run from -1 to 1 along either axis, whatever its length
        torch.stack([cos, (sin + of("shear_x") * SHEAR) * height / width, of("translate_x") * 2 * TRANSLATE], -1),
        torch.stack([(of("shear_y") * SHEAR - sin) * width / height, cos, of("translate_y") * 2 * TRANSLATE], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1).to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def blended(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """Nearer to or farther from black, grey, the mean grey or a smoothed picture."""
    grey = greyed(images)
    degenerate = torch.zeros_like(images)
    for name, other in (
        ("colour", grey),
        ("contrast", grey.mean((2, 3), keepdim=True)),
        ("sharpness", smoothed(images)),
    ):
        asked = (chosen == OPERATIONS.index(name))[:, None, None, None]
        degenerate = torch.where(asked, other.expand_as(images), degenerate)
    factor = (1 + strength * BLEND)[:, None, None, None]
    return (degenerate + factor * (images - degenerate)).clamp(0, 1)


def greyed(images: Tensor) -> Tensor:
    """[N, 1, H, W]."""
    if images.shape[1] != len(GREY):
        return images.mean(1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[:, None]


def smoothed(images: Tensor) -> Tensor:
    """The mean of 3 x 3 pixels, the middle one five times; the border stays."""
    whole = F.avg_pool2d(images, 3, 1) * (9 / 13) + images[..., 1:-1, 1:-1] * (4 / 13)
    return F.pad(whole, (1, 1, 1, 1)) + images * border(images)


def border(images: Tensor) -> Tensor:
    """1 along the border, [H, W]."""
    inside = torch.zeros_like(images[0, 0, 1:-1, 1:-1])
    return F.pad(inside, (1, 1, 1, 1), value=1.0)


def posterized(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """With fewer bits a value."""
    step = 2 ** (strength.abs()[:, None, None, None] * BITS).round()
    return (in_bytes(images) / step).floor() * step / (LEVELS - 1)


def solarized(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """Bright values turned round."""
    return torch.where(images >= 1 - strength.abs()[:, None, None, None], 1 - images, images)


def stretched(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """Every channel from 0 to 1; one of a single value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def equalized(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """Every channel with an even histogram, as PIL's look-up tables make it."""
    values = in_bytes(images).long().flatten(2)
    counts = torch.zeros(*values.shape[:2], LEVELS, device=images.device, dtype=torch.long)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(2, keepdim=True))  # of the highest value that occurs
    step = (values.shape[2] - last).div(LEVELS - 1, rounding_mode="floor")
    before = counts.cumsum(2) - counts
    table = ((before + step.div(2, rounding_mode="floor")) // step.clamp(min=1)).clamp(max=LEVELS - 1)
    found = table.gather(2, values).to(images.dtype).view_as(images) / (LEVELS - 1)
    return torch.where((step > 0)[..., None], found, images)


def in_bytes(images: Tensor) -> Tensor:
    """0 to 255, whole numbers of the pictures' own type."""
    return (images * (LEVELS - 1)).round().clamp(0, LEVELS - 1)


KINDS = {
    ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"): moved,
    ("brightness", "colour", "contrast", "sharpness"): blended,
    ("posterize",): posterized,
    ("solarize",): solarized,
    ("autocontrast",): stretched,
    ("equalize",): equalized,
}
