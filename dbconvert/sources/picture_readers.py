"""Trained Transformers models that look at pictures: by what they make of them, sets of pictures are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.errors import DBConvertError
from dbconvert.schema import read_json
from dbconvert.sources.transformers_config import first_line
from dbconvert.sources.transformers_files import fetch, quiet

PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class PictureReader:
    """A model without its head, and the pictures that it takes.

    Args:
        mean, std: of a channel, what pictures in [0, 1] are normalised by.
        size: of its pictures; None where it takes any.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None

    def __call__(self, pictures: Tensor) -> Tensor:
        """What leaves its last layer: tokens [N, T, d] or maps [N, d, H, W]."""
        found: Tensor = self.model(pixel_values=pictures).last_hidden_state
        return found


def open_picture_reader(location: str) -> PictureReader:
    """From a folder or the hub. Code that a repository brings along is not run.

    Raises:
        DBConvertError: it is no such model, cannot be read, or does not say how its pictures are normalised.
    """
    import transformers

    folder = Path(location).expanduser()
    if not folder.is_dir():
        folder = fetch(location, ("*.json", "*.safetensors"))
    if not (folder / PREPROCESSOR).is_file():
        raise DBConvertError(
            f"{location} does not say how its pictures are normalised: it has no {PREPROCESSOR}",
            hint="add one with image_mean and image_std, or wrap the model in a model.py",
        )
    settings = read_json(folder / PREPROCESSOR)
    with quiet(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # a pooler that is not stored is not used either, but counts in the fingerprint
        try:
            model, told = transformers.AutoModel.from_pretrained(
                str(folder), trust_remote_code=False, output_loading_info=True
            )
        except Exception as error:  # of many kinds, all meaning that there is none to be had
            raise DBConvertError(f"cannot read a model of pictures from {location}", why=first_line(error)) from None
    absent = sorted(key for key in told["missing_keys"] if not key.startswith("pooler."))
    if absent:
        raise DBConvertError(f"the weights in {location} lack {absent[0]}", hint="its features would be random")
    return PictureReader(
        model.eval(), channels(settings, "image_mean"), channels(settings, "image_std"), size_of(model)
    )


def channels(settings: Any, key: str) -> tuple[float, ...]:
    """Raises DBConvertError where a preprocessor does not hold a number a channel."""
    try:
        return tuple(float(value) for value in settings[key])
    except (KeyError, TypeError, ValueError):
        raise DBConvertError(f"{PREPROCESSOR} says no {key}", hint="one number a channel") from None


def size_of(model: nn.Module) -> int | None:
    size = getattr(model.config, "image_size", None)
    return size if isinstance(size, int) else None
