"""Shrunken default configurations: the same network, but narrow, shallow and with few tokens.

Two ways, tried in turn until one builds and runs. `fixed` gives every width, head and rank of a language model one
small value that fits the others. `divided` divides all widths by one factor and keeps counts of heads, so that
whatever linear relation held between them still holds: pyramids, and configurations with unusual fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from itertools import chain
from typing import Any

from transformers import PretrainedConfig

DEPTH = 4
STAGE_DEPTH = 3
TOKENS = 131
CHUNK = 8
FACTORS = (8, 4, 16, 2)
IMAGES = (32, 64, 224)

SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "pad_index": 0}
COMMON = {
    **SPECIAL_TOKENS,
    "use_cache": False,
    "vocab_size": TOKENS,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "sliding_window": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
HEADS = dict.fromkeys(
    ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
     "num_key_value_heads"), 4,
)  # fmt: skip
WIDE = dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "embedding_size", "emb_dim"), 64)
INNER = dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 128)
PARTS = {
    "head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": 16, "mamba_d_state": 8, "state_size": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "rotary_dim": 8,
}  # fmt: skip
FIXED = {**HEADS, **WIDE, **INNER, **PARTS}
DROPS: tuple[tuple[str, ...], ...] = (
    (),
    ("None",),
    ("head_dim",),
    ("embedding_size",),
    ("hidden_size",),
    ("embed_dim", "dim"),
    ("sliding_window",),
    ("num_key_value_heads", "head_dim"),
    ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim"),
)
"""Fields that are left as they are, one set a try: their name means something else in some configuration.
`None` leaves fields without a value without one."""

NESTED = {"linear_attn_config"}
"""Fields that hold sizes in a plain dictionary."""

LAYERS = re.compile(r"^(n_layers?|(num_|n_)?((hidden|encoder|decoder|global|local)_)*layers|depth|num_blocks)$")
DEPTHS = re.compile(r"^(depths?|num_blocks|layers|stage_num_blocks|num_block_repeats|n_layers_list|block_sizes)$")
WIDTHS = re.compile(r"(sizes?|dims?|channels?|width|widths|planes|rank|embd|d_model|d_ff|d_kv|inner|latents|features)$")
NOT_WIDTHS = re.compile(
    r"vocab|patch|image|kernel|window|chunk|batch|num_channels|stride|block_size|buckets|ratio|group_size|position"
    r"|max_|grid|crop|pool|tile|conv_size|sr_|depth_size"
)


def shrunken(default: PretrainedConfig, changes: dict[str, Any]) -> Iterator[PretrainedConfig | Exception]:
    """Shrunken forms of a configuration, most likely first; in place of one that is not valid, its error.

    Args:
        changes: fields that are set whatever the rules say.
    """
    ways = [[(fixed, drop) for drop in DROPS], [(divided, factor) for factor in FACTORS]]
    for rule, option in chain(*(reversed(ways) if has_stages(default) else ways)):
        for image in IMAGES if has_images(default) else IMAGES[:1]:
            try:
                yield rebuilt(default, rule, option, image, changes)
            except Exception as error:
                yield error


def has_images(config: PretrainedConfig) -> bool:
    return "image_size" in names(config) or any(has_images(sub) for sub in subs(config).values())


def has_stages(config: PretrainedConfig) -> bool:
    """Whether depths are given stage by stage, as those of a pyramid are."""
    return any(DEPTHS.match(name) and isinstance(vars(config).get(name), list | tuple) for name in names(config))


def names(config: PretrainedConfig) -> set[str]:
    return {field.name for field in fields(config) if field.init}


def subs(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    found = {name: getattr(config, name, None) for name in type(config).sub_configs}
    return {name: sub for name, sub in found.items() if isinstance(sub, PretrainedConfig)}


def rebuilt(config: PretrainedConfig, rule: Any, option: Any, image: int, changes: dict[str, Any]) -> PretrainedConfig:
    """The configuration made again from changed fields, the configurations inside it likewise."""
    own: dict[str, Any] = {}
    for name in names(config) - set(type(config).sub_configs):
        value = vars(config).get(name)  # past the check of fields that vary by layer
        new = new_value(name, value, config, rule, option, image)
        if new is not value:
            own[name] = new
    for name, sub in subs(config).items():
        inner = changes.get(name, {})
        own[name] = rebuilt(sub, rule, option, image, inner if isinstance(inner, dict) else {})
    own.update({k: v for k, v in changes.items() if k not in subs(config)})
    return type(config)(**own)


def new_value(name: str, value: Any, config: PretrainedConfig, rule: Any, option: Any, image: int) -> Any:
    """The first rule that has something to say about a field decides."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    listed = isinstance(value, list | tuple) and len(value) > 0
    if isinstance(value, bool) and name != "use_cache":
        new = value
    elif name in COMMON:
        smaller = whole and 0 < value < COMMON[name]
        new = value if smaller or (value is None and name == "sliding_window") else COMMON[name]
    elif whole and "vocab" in name:
        new = min(value, TOKENS)
    elif whole and name.endswith("chunk_size"):
        new = min(value, CHUNK)
    elif name == "image_size" and (whole or listed):
        new = image if whole else type(value)([image] * len(value))
    elif whole and LAYERS.match(name):
        new = min(value, DEPTH)
    elif listed and DEPTHS.match(name) and all(isinstance(v, int) for v in value):
        new = type(value)(min(v, STAGE_DEPTH) for v in value)
    elif listed and DEPTH < len(value) == depth_of(config):
        new = type(value)(every_kind(list(value)))
    elif isinstance(value, dict) and name in NESTED:
        new = {key: rule(key, inner, option) for key, inner in value.items()}
    else:
        new = rule(name, value, option)
    return new


def depth_of(config: PretrainedConfig) -> int:
    return getattr(config, "num_hidden_layers", None) or 0


def every_kind(values: list[Any]) -> list[Any]:
    """The first few of a list with one entry a layer; kinds that they lack take the places of repeated ones."""
    kept = values[:DEPTH]
    for kind in [v for i, v in enumerate(values) if v not in values[:i] and v not in kept]:
        repeated = [i for i, v in enumerate(kept) if v in kept[:i]]
        if repeated:
            kept[repeated[-1]] = kind
    return kept


def fixed(name: str, value: Any, drop: tuple[str, ...]) -> Any:
    if isinstance(value, list | tuple):
        return divided(name, value, FACTORS[0])
    kept = name in drop or (value is None and "None" in drop)
    return value if name not in FIXED or kept else FIXED[name]


def divided(name: str, value: Any, factor: int) -> Any:
    if not WIDTHS.search(name) or NOT_WIDTHS.search(name):
        return value
    if isinstance(value, list | tuple):
        return type(value)(divided(name, v, factor) for v in value)
    small = not isinstance(value, int) or isinstance(value, bool) or value < 4 * factor or value % factor
    return value if small else value // factor
