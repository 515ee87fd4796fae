"""Autoencoders of diffusers that make latents of pictures, and pictures of latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbconvert.data.content import tensors_digest
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.sources.resolve import HUB_ID
from dbconvert.sources.transformers_config import first_line
from dbconvert.sources.transformers_files import quiet


@dataclass(frozen=True)
class Vae:
    """An AutoencoderKL. Pictures [N, 3, H, W] lie in [0, 1], latents [N, C, H / factor, W / factor] are unscaled.

    Args:
        location: the folder or hub id that it is from.
        digest: SHA-256 of its weights.
    """

    model: Any
    location: str
    digest: str

    @property
    def channels(self) -> int:
        return int(self.model.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side."""
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    @property
    def scale(self) -> float:
        """What the networks that use its latents multiply them by."""
        return float(self.model.config.scaling_factor)

    @property
    def shift(self) -> float:
        """What is subtracted before."""
        return float(getattr(self.model.config, "shift_factor", None) or 0.0)

    def refuse(self, shape: tuple[int, ...]) -> None:
        """Raises UsageError for pictures [C, H, W] that it does not take."""
        wanted = int(self.model.config.in_channels)
        if shape[0] != wanted:
            raise UsageError(f"the VAE {self.location} takes {wanted} channels, and the pictures have {shape[0]}")
        if shape[1] % self.factor or shape[2] % self.factor:
            raise UsageError(
                f"pictures of {shape[1]} x {shape[2]} pixels make no whole latents of {self.location}",
                hint=f"set data.image.size to a multiple of {self.factor}",
            )

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, on the CPU."""
        found = self.model.encode(pictures.to(self.model.device) * 2 - 1).latent_dist
        return found.mean.cpu(), found.std.cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, on the CPU."""
        found: Tensor = self.model.decode(latents.to(self.model.device)).sample
        return ((found + 1) / 2).clamp(0, 1).cpu()


def open_vae(location: str, revision: str | None = None) -> Vae:
    """From a folder or the hub, from safetensors only, on the device that there is.

    Raises:
        UsageError: there is no such folder.
        DBConvertError: diffusers is not installed, or it is no AutoencoderKL that can be read.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise DBConvertError("data.latents needs diffusers", hint="pip install 'dbconvert[diffusion]'") from None
    folder = Path(location).expanduser()
    if not folder.is_dir() and (folder.exists() or not HUB_ID.match(location)):
        raise UsageError(f"there is no VAE {location}", hint="give a folder of diffusers or a hub id")
    where = str(folder) if folder.is_dir() else location
    reader: Any = AutoencoderKL.from_pretrained
    with quiet():
        try:
            model: Any = reader(where, revision=revision, use_safetensors=True, low_cpu_mem_usage=False)
        except Exception as error:  # of many kinds, all meaning that there is none to be had
            raise DBConvertError(
                f"cannot read a VAE from {location}",
                why=first_line(error),
                hint="give a folder or a hub id that holds config.json and diffusion_pytorch_model.safetensors",
            ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Vae(model.eval().requires_grad_(False).to(device), location, tensors_digest(model.state_dict()))
