"""Families of Transformers, from tiny random configurations."""

import torch
import transformers as hf
from networks import DEPTH, HEADS, LENGTH, TEXT, VISION, VOCABULARY, WIDTH, images, tokens

from tests.acceptance.rows import Row

SMALL = {"use_cache": False, "num_key_value_heads": 2}
GQA = {**TEXT, **SMALL}
PATCHES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 64}
PYRAMID = {"depths": [2, 2], "num_labels": 5}


def text(cls, config, **facts):
    return Row(lambda: (cls(config()), {"input_ids": tokens()}), **facts)


def vision(cls, config, size=16, **facts):
    return Row(lambda: (cls(config()), {"pixel_values": images(size=size)}), **facts)


def swin():
    return hf.SwinConfig(
        **PYRAMID, image_size=16, patch_size=2, embed_dim=16, num_heads=[2, 4], window_size=4, drop_path_rate=0.1
    )


def resnet():
    return hf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[3, 3], layer_type="basic", num_labels=5)


def deepseek():
    return hf.DeepseekV3Config(
        **TEXT, use_cache=False, num_key_value_heads=HEADS, moe_intermediate_size=16, n_routed_experts=4, n_group=2,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip


def jamba():
    return hf.JambaConfig(
        **GQA, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
        num_experts_per_tok=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip


def whisper_encoder():
    config = hf.WhisperConfig(
        d_model=WIDTH, encoder_layers=DEPTH, encoder_attention_heads=HEADS, encoder_ffn_dim=64, decoder_layers=1,
        decoder_attention_heads=HEADS, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=LENGTH, vocab_size=61,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    features = torch.randn(2, 8, 2 * LENGTH, generator=torch.Generator().manual_seed(0))
    return hf.models.whisper.modeling_whisper.WhisperEncoder(config), {"input_features": features}


def t5_encoder():
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=DEPTH, num_heads=HEADS, use_cache=False
    )
    return hf.T5EncoderModel(config), {"input_ids": tokens()}


def gpt_like(cls, config, **changes):
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "n_positions": 64}
    return text(cls, lambda: config(**sizes, use_cache=False, **changes), branches=2)


ROWS = {
    "hf_deit": vision(hf.DeiTForImageClassification, lambda: hf.DeiTConfig(**VISION)),
    "hf_dinov2": vision(
        hf.Dinov2ForImageClassification,
        lambda: hf.Dinov2Config(**PATCHES, image_size=16, patch_size=4, mlp_ratio=2, drop_path_rate=0.1, num_labels=5),
    ),
    "hf_beit": vision(hf.BeitForImageClassification, lambda: hf.BeitConfig(**VISION, use_mask_token=False)),
    "hf_siglip": vision(
        hf.SiglipVisionModel, lambda: hf.SiglipVisionConfig(**PATCHES, image_size=16, patch_size=4)
    ),
    "hf_qwen2": text(hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**GQA)),
    "hf_qwen3": text(hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**GQA, head_dim=8)),
    "hf_mistral": text(hf.MistralForCausalLM, lambda: hf.MistralConfig(**GQA, sliding_window=4)),
    "hf_gemma2": text(hf.Gemma2ForCausalLM, lambda: hf.Gemma2Config(**GQA, head_dim=8, sliding_window=4)),
    "hf_gemma3": text(
        hf.Gemma3ForCausalLM,
        lambda: hf.Gemma3TextConfig(
            **GQA, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2
        ),
    ),
    "hf_gpt_neox": text(hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**TEXT, use_cache=False)),
    "hf_gpt_neox_sequential": text(
        hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**TEXT, use_cache=False, use_parallel_residual=False)
    ),
    "hf_gptj": gpt_like(hf.GPTJForCausalLM, hf.GPTJConfig, rotary_dim=4),
    "hf_falcon": text(hf.FalconForCausalLM, lambda: hf.FalconConfig(**TEXT, use_cache=False)),
    "hf_phi": text(hf.PhiForCausalLM, lambda: hf.PhiConfig(**TEXT, use_cache=False)),
    "hf_bloom": text(
        hf.BloomForCausalLM,
        lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=DEPTH, n_head=HEADS, use_cache=False),
    ),
    "hf_olmo2": text(hf.Olmo2ForCausalLM, lambda: hf.Olmo2Config(**GQA)),
    "hf_granite": text(hf.GraniteForCausalLM, lambda: hf.GraniteConfig(**GQA, residual_multiplier=0.5)),
    "hf_cohere": text(hf.CohereForCausalLM, lambda: hf.CohereConfig(**GQA)),
    "hf_mixtral": text(
        hf.MixtralForCausalLM, lambda: hf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2), mixes=True
    ),
    "hf_deepseek_v3": text(hf.DeepseekV3ForCausalLM, deepseek, mixes=True),
    "hf_mamba": text(
        hf.MambaForCausalLM,
        lambda: hf.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=DEPTH, state_size=4, use_cache=False
        ),
        branches=1,
    ),
    "hf_jamba": text(hf.JambaForCausalLM, jamba, mixes=True),
    "hf_modernbert": text(
        hf.ModernBertForMaskedLM, lambda: hf.ModernBertConfig(**TEXT, local_attention=8, global_attn_every_n_layers=2)
    ),
    "hf_albert": text(
        hf.AlbertForMaskedLM, lambda: hf.AlbertConfig(**TEXT, embedding_size=16), verdict="looped", layers=1, post=True
    ),
    "hf_whisper_encoder": Row(whisper_encoder),
    "hf_t5_encoder": Row(t5_encoder, verdict="refused", kind="layer-made-input", node="encoder.block.0"),
    "hf_swin": vision(hf.SwinForImageClassification, swin, verdict="refused", node="swin.encoder.layers"),
    "hf_swin_stage": vision(
        hf.SwinForImageClassification, swin, verdict="restricted", layers=2, stack="swin.encoder.layers.1.blocks"
    ),
    "hf_resnet": vision(hf.ResNetForImageClassification, resnet, verdict="refused", node="resnet.encoder.stages"),
    "hf_resnet_stage": vision(
        hf.ResNetForImageClassification, resnet, size=64, verdict="restricted", layers=2, branches=1, post=True,
        width=64, stack="resnet.encoder.stages.1.layers",
    ),
}  # fmt: skip
