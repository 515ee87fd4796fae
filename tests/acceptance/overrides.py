"""What the general rules cannot know about single configurations. Keys are Transformers' model types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ROPE = {"rope_type": "default", "rope_theta": 10000.0}

START: dict[str, dict[str, Any]] = {
    # The default configuration is not valid by itself.
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}
"""Arguments of the default configuration."""

CHANGES: dict[str, dict[str, Any]] = {
    # The released pattern has one entry a layer; so has the shorter one.
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    # Defaults without which the forward pass cannot run.
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "output_gate_type": "sigmoid",
    },
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 48)},
    # Layers with a sliding window have head sizes of their own, given as aliases of fields.
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16,
    },
    # The global part is as wide as two tokens of the local encoder, and is called by another name in the decoder.
    "blt": {"global_config": {"hidden_size": 128, "head_dim": 32}, "decoder_config": {"hidden_size_global": 128}},
    # Caches that later layers share: more than there are layers left.
    "gemma3n_text": {"num_kv_shared_layers": 0},
    # The rotary part has to be as wide as its head dimension says; top k of what is left of the experts.
    "longcat_flash": {"head_dim": 8, "moe_topk": 2, "zero_expert_num": 2},
    # Layers that share weights with a later one need a later one.
    "zamba": {
        "num_hidden_layers": 8,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention"] * 2,
    },
    # Its stem and its end have widths of their own, which only this coefficient scales.
    "efficientnet": {
        "width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320,
        "in_channels": (32, 16, 24, 40, 80, 112, 192), "out_channels": (16, 24, 40, 80, 112, 192, 320),
    },
    # Tokens that stand for the image, and the two answers.
    "shieldgemma2": {
        "image_token_index": 130, "boi_token_index": 128, "eoi_token_index": 129, "mm_tokens_per_image": 4,
    },
    # Depth under another name.
    "perceiver": {"num_self_attends_per_block": 4},
}  # fmt: skip
"""Fields to set whatever the rules say; those of an inner configuration under its name."""


def set_language(model: nn.Module) -> None:
    model.set_default_language("en_XX")


def set_answers(model: nn.Module) -> None:
    """The tokens of yes and no, whose defaults lie past the shrunken vocabulary."""
    model.yes_token_index, model.no_token_index = 5, 6


PREPARE: dict[str, Callable[[nn.Module], None]] = {"xmod": set_language, "shieldgemma2": set_answers}
"""What is done before the first forward pass: adapters of a language are chosen by name."""


def patches(model: nn.Module) -> dict[str, Any]:
    """Patches of images of any size, flattened, with their layout."""
    vision = model.config.vision_config
    features = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.randn(2, 16, features, generator=torch.Generator().manual_seed(0)),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def image_and_text(model: nn.Module) -> dict[str, Any]:
    config = model.config
    ids = torch.full((2, 12), 7)
    ids[:, 2 : 2 + config.mm_tokens_per_image] = config.image_token_index
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def codebooks(model: nn.Module) -> dict[str, Any]:
    """Audio tokens [N codebooks, T]."""
    rows = 2 * model.config.num_codebooks
    return {"input_ids": torch.randint(3, 100, (rows, 12), generator=torch.Generator().manual_seed(0))}


INPUTS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "siglip2": patches,
    "shieldgemma2": image_and_text,
    "musicgen": codebooks,
    "musicgen_melody": codebooks,
}
"""Arguments of forward beside (or instead of) pixels or tokens."""
