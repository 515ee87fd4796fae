"""RandAugment against PIL, operation by operation, and that every picture draws its own."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from dbconvert.data.randaugment import BITS, BLEND, KINDS, OPERATIONS, ROTATE, SHEAR, TRANSLATE, operate, randaugment

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 20
STRENGTHS = (0.3, -0.8)


def pictures(channels=3):
    """Smooth ones, so that histograms are uneven: [2, C, 20, 20] bytes as numbers in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, channels, 5, 5, generator=generator) * 0.7 + 0.1
    smooth = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


def affine(picture, matrix):
    """PIL maps places of the result to places of the picture, in pixels from its corner."""
    a, b, c, d, e, f = matrix
    half = SIZE / 2
    shifted = (a, b, c + half - a * half - b * half, d, e, f + half - d * half - e * half)
    return picture.transform((SIZE, SIZE), Image.Transform.AFFINE, shifted, Image.Resampling.NEAREST)


def by_pil(name, picture, s):
    angle = s * ROTATE
    return {
        "identity": lambda: picture,
        "shear_x": lambda: affine(picture, (1, s * SHEAR, 0, 0, 1, 0)),
        "shear_y": lambda: affine(picture, (1, 0, 0, s * SHEAR, 1, 0)),
        "translate_x": lambda: affine(picture, (1, 0, s * TRANSLATE * SIZE, 0, 1, 0)),
        "translate_y": lambda: affine(picture, (1, 0, 0, 0, 1, s * TRANSLATE * SIZE)),
        "rotate": lambda: affine(picture, (math.cos(angle), math.sin(angle), 0, -math.sin(angle), math.cos(angle), 0)),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(1 + s * BLEND),
        "colour": lambda: ImageEnhance.Color(picture).enhance(1 + s * BLEND),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(1 + s * BLEND),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(1 + s * BLEND),
        "posterize": lambda: ImageOps.posterize(picture, 8 - round(BITS * abs(s))),
        "solarize": lambda: ImageOps.solarize(picture, 255 * (1 - abs(s))),
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
    }[name]()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pils(name, channels):
    images = pictures(channels)
    found = operate(images, torch.full((2,), OPERATIONS.index(name)), torch.tensor(STRENGTHS))
    for image, ours, strength in zip(images, found, STRENGTHS, strict=True):
        array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        theirs = np.array(by_pil(name, Image.fromarray(array.squeeze()), strength), dtype=np.float32)
        difference = (ours * 255 - torch.from_numpy(theirs.reshape(SIZE, SIZE, channels)).permute(2, 0, 1)).abs()
        # PIL rounds to bytes; a place between two pixels may go to either
        assert difference.median() <= 1 and (difference > 2.01).float().mean() <= 0.02
    if name != "identity" and (name, channels) != ("colour", 1):
        assert (found - images).abs().amax((1, 2, 3)).min() > 0.003


def test_each_picture_has_its_own_operation():
    images = pictures()[:1].expand(len(OPERATIONS), -1, -1, -1)
    strengths = torch.full((len(OPERATIONS),), 0.6)
    together = operate(images, torch.arange(len(OPERATIONS)), strengths)
    for index in range(len(OPERATIONS)):
        alone = operate(images[:1], torch.tensor([index]), strengths[:1])
        assert torch.allclose(together[index], alone[0], atol=1e-6)


def test_all_at_once_is_the_same():
    """As on a device: there every operation runs on all pictures."""
    images = torch.rand(len(OPERATIONS) * 2, 3, 8, 8)
    chosen = torch.arange(len(images)) % len(OPERATIONS)
    strength = torch.linspace(-1, 1, len(images))
    found = operate(images, chosen, strength)
    for names, act in KINDS.items():
        everywhere = act(images, chosen, strength)
        own = torch.tensor([OPERATIONS[i] in names for i in chosen])
        assert own.sum() == 2 * len(names) and torch.allclose(everywhere[own], found[own], atol=1e-6)


def test_it_is_random_by_picture_and_a_function_of_the_seed():
    images = pictures()[:1].expand(64, -1, -1, -1)
    torch.manual_seed(0)
    first = randaugment(images, 2, 9)
    torch.manual_seed(0)
    assert torch.equal(first, randaugment(images, 2, 9)) and first.shape == images.shape
    assert first.min() >= 0 and first.max() <= 1
    assert len(first.flatten(1).unique(dim=0)) > 40


def test_a_plain_picture_survives():
    images = torch.full((len(OPERATIONS), 3, 8, 8), 0.5)
    found = operate(images, torch.arange(len(OPERATIONS)), torch.full((len(OPERATIONS),), 0.3))
    assert torch.isfinite(found).all() and torch.equal(found[OPERATIONS.index("equalize")], images[0])
