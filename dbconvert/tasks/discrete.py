"""What tasks with discrete targets share: a table of their embeddings, and a head that reads the denoised features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.conditioning.modulation import Curve, curved
from dbconvert.plan import Target
from dbconvert.tasks.base import Change, Corruption, along, conditioning


def register_table(model: nn.Module, target: Target, seed: int) -> None:
    """Adds `target.weight` [K, d], or [L K, d], random of norm 1; it is used normalised, so that embeddings cannot
    collapse."""
    table = nn.Embedding(target.labels * target.classes, target.width)
    if table.weight.device.type != "meta":
        random = torch.randn(table.weight.shape, generator=torch.Generator().manual_seed(seed))
        table.weight.data.copy_(F.normalize(random, dim=-1))
    conditioning(model).add_module("target", table)


def fresh_table(model: nn.Module) -> Tensor:
    """The table that `register_table` added, normalised, [K, d]."""
    return F.normalize(conditioning(model).get_parameter("target.weight").float(), dim=-1)


def above_mean(expected: Tensor, table: Tensor, several: int = 1) -> Tensor:
    """Expected rows of a table of unit vectors, or sums of several, less their mean: coordinates of about 1 if sure."""
    above: Tensor = (expected - several * table.mean(0)) * (table.shape[-1] / several) ** 0.5
    return above


def register_readouts(model: nn.Module, blocks: int, width: int, features: int) -> None:
    """Adds for each block a linear from the conditioning to the shift and scale of the features before the head."""
    hollow = any(parameter.is_meta for parameter in model.parameters())
    readout = {str(b): zero_linear(width, 2 * features, hollow=hollow) for b in range(blocks)}
    conditioning(model).add_module("readout", nn.ModuleDict(readout))


def zero_linear(inputs: int, outputs: int, *, hollow: bool) -> nn.Linear:
    """A linear of zeros; `hollow` as one expanded zero that takes no memory, for networks that are only written."""
    linear = nn.Linear(inputs, outputs, device="meta" if hollow else None)
    for name, parameter in list(linear.named_parameters()):
        if hollow:
            setattr(linear, name, nn.Parameter(torch.zeros(()).expand(parameter.shape)))
        else:
            nn.init.zeros_(parameter)
    return linear


def denoise_before_head(model: nn.Module, block: int, corruption: Corruption, condition: Tensor) -> Change:
    """What happens to features F before the head: D = c_skip z + c_out F, over sigma_data, modulated.

    Over sigma_data, so that the head sees features of the scale it knows at every noise level.

    Args:
        condition: [N, width] or [N, S, width].
    """
    read, denoised = modulated_denoised(model, block, corruption, condition), Denoising.at(corruption).of(corruption.z)
    return lambda features: read(denoised(features))


def modulated_denoised(model: nn.Module, block: int, corruption: Corruption, condition: Tensor) -> Change:
    """`modulated` of D over sigma_data. With `silu` the shift is over sigma_data too, which makes the whole the
    reference's D (1 + scale) + shift over sigma_data.
    """
    return modulated(model, block, condition, corruption.scaling.sigma_data if curve_of(model) == "silu" else 1.0)


def curve_of(model: nn.Module) -> Curve:
    """What follows the linears of a converted network's modulation."""
    curve: Curve = getattr(conditioning(model), "curve", "linear")
    return curve


@dataclass(frozen=True)
class Denoising:
    """D = c_skip z + c_out F, over sigma_data, at levels that stay.

    Args:
        skip, out: c_skip and c_out over sigma_data, shaped to multiply z.
    """

    skip: Tensor
    out: Tensor

    @classmethod
    def at(cls, corruption: Corruption) -> Denoising:
        scaling, sigma = corruption.scaling, along(corruption.sigma, corruption.z)
        return cls(scaling.c_skip(sigma) / scaling.sigma_data, scaling.c_out(sigma) / scaling.sigma_data)

    def of(self, z: Tensor) -> Change:
        """What becomes of features F of the shape of z."""
        skipped = self.skip * z

        def change(features: Tensor) -> Tensor:
            kind = features.dtype
            return torch.addcmul(skipped.to(kind), self.out.to(kind), features)

        return change


def modulated(model: nn.Module, block: int, condition: Tensor, unit: float = 1.0) -> Change:
    """What `register_readouts` added: features (1 + scale) + shift before the head.

    Args:
        condition: [N, width] or [N, S, width].
        unit: what the shift is divided by.
    """
    rows = curved(conditioning(model).get_submodule(f"readout.{block}")(condition), curve_of(model))
    shift, scale = rows.chunk(2, -1)
    shift = shift / unit if unit != 1.0 else shift

    def read(features: Tensor) -> Tensor:
        by, to = scale.to(features.dtype), shift.to(features.dtype)
        if by.dim() < features.dim():
            by, to = by[:, None], to[:, None]
        scaled: Tensor = features * (1 + by) + to
        return scaled

    return read
