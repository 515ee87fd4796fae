"""From what a network of images draws to pictures: its scale undone, or its latents decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dbconvert.data.images import denormalise
from dbconvert.data_options import DataOptions
from dbconvert.engine.runs import RUN
from dbconvert.errors import UsageError
from dbconvert.sources.vae import Vae, open_vae


def opened_vae(data: DataOptions, target: str, channels: int) -> Vae | None:
    """The VAE of a network's latents; None where it draws pictures.

    Args:
        channels: that the network draws.

    Raises:
        UsageError: its latents have other channels.
        DBConvertError: it cannot be read.
    """
    if data.latents is None:
        return None
    vae = open_vae(data.latents.vae, data.latents.revision)
    if vae.channels != channels:
        raise UsageError(
            f"{target} draws latents of {channels} channels, and those of {vae.location} have {vae.channels}",
            hint="give the VAE that it was trained with",
        )
    return vae


def with_vae(data: DataOptions, target: str, vae: str | None) -> DataOptions:
    """The data options with the VAE that is given, or the one that a run was trained with.

    What a checkpoint's metadata name is not opened unasked.

    Raises:
        UsageError: one is given and not used, or none is where one has to be.
    """
    if data.latents is None:
        if vae is not None:
            raise UsageError(f"{target} draws pictures, not latents", hint="leave out the VAE")
        return data
    if vae is None and not (Path(target) / RUN).is_file():
        raise UsageError(f"{target} draws latents of the VAE {data.latents.vae}", hint="give it with --vae")
    return data if vae is None else replace(data, latents=replace(data.latents, vae=vae, revision=None))


def pictures(drawn: Tensor, data: DataOptions, vae: Vae | None, batch: int) -> Iterator[Tensor]:
    """Pictures in [0, 1] of what was drawn, in the network's own scale; in batches, since latents become larger."""
    if vae is None or data.latents is None:
        yield from (denormalise(part, data.image) for part in torch.split(drawn, batch))
        return
    scale = vae.scale if data.latents.scale is None else data.latents.scale
    for part in torch.split(drawn, data.latents.batch):
        yield vae.decode(part / scale + vae.shift)
