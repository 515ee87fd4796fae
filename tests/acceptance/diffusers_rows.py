"""Families of diffusers, from tiny random configurations; none where diffusers is not installed."""

from importlib.util import find_spec

import torch
from networks import DEPTH, HEADS

from tests.acceptance.rows import Row

HEAD = 8


def noisy(channels, *shape):
    return torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(0))


def steps():
    return torch.tensor([10, 700])


def words(width, length=6):
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(1))


def dit():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=8, num_layers=DEPTH,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    labels = torch.tensor([1, 2])
    return model, {"hidden_states": noisy(4, 8, 8), "timestep": steps(), "class_labels": labels, "return_dict": False}


def pixart():
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=8, num_layers=DEPTH,
        sample_size=8, patch_size=2, caption_channels=16, cross_attention_dim=HEADS * HEAD, norm_num_groups=4,
        use_additional_conditions=False,
    )  # fmt: skip
    added = {"resolution": None, "aspect_ratio": None}
    given = {"hidden_states": noisy(4, 8, 8), "encoder_hidden_states": words(16), "timestep": steps()}
    return model, {**given, "added_cond_kwargs": added, "return_dict": False}


def sd3():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=DEPTH, attention_head_dim=HEAD,
        num_attention_heads=HEADS, joint_attention_dim=16, caption_projection_dim=HEADS * HEAD,
        pooled_projection_dim=12, pos_embed_max_size=16,
    )  # fmt: skip
    given = {"hidden_states": noisy(4, 8, 8), "encoder_hidden_states": words(16), "timestep": steps()}
    return model, {**given, "pooled_projections": noisy(12), "return_dict": False}


def flux():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=DEPTH, attention_head_dim=HEAD,
        num_attention_heads=HEADS, joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    given = {"hidden_states": noisy(9, 4), "encoder_hidden_states": words(16), "pooled_projections": noisy(12)}
    places = {"img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(6, 3)}
    return model, {**given, **places, "timestep": torch.tensor([0.1, 0.7]), "return_dict": False}


def flux2():
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=DEPTH, attention_head_dim=HEAD, num_attention_heads=HEADS,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=16, guidance_embeds=False,
    )  # fmt: skip
    given = {"hidden_states": noisy(9, 4), "encoder_hidden_states": words(16), "timestep": torch.tensor([0.1, 0.7])}
    return model, {**given, "img_ids": torch.zeros(9, 4), "txt_ids": torch.zeros(6, 4), "return_dict": False}


def unet():
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": noisy(3, 8, 8), "timestep": steps(), "return_dict": False}


ALL = {
    "dit": Row(dit, conditioned=True),
    "pixart": Row(pixart, conditioned=True),
    "sd3": Row(sd3, conditioned=True, streams=2),
    "flux": Row(flux, layers=2 + DEPTH, conditioned=True, streams=2),
    "flux2": Row(flux2, layers=2 + DEPTH, conditioned=True, streams=2),
    "unet2d": Row(unet, verdict="refused"),
}
ROWS = ALL if find_spec("diffusers") else {}
