"""A tiny random AutoencoderKL of diffusers in a folder: grey pictures to latents of 4 channels and half the size."""

import torch


def save_vae(folder, seed=0, channels=1):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=4,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=8,
    )
    model.save_pretrained(folder)
    return folder
