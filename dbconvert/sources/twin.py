"""Twins: configurations of the same architecture with every size shrunk, for proofs that need numbers.

A size is known by what its attribute is called, whatever the architecture. Head counts are divided by `heads`,
what lies within a head by `within`, widths by both, so that ratios between them stay whole. Depth is cut last:
the caller checks that all kinds of layers are still there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

Config = dict[str, Any]

HEADS = re.compile(r"(^|_)heads?$|^n_head_kv$")
WITHIN_HEAD = re.compile(r"head_(dim|size)$|^d_kv$|^rotary_dim$")
STREAM = re.compile(r"^(d_model|dim|n_embd|embed_dim|hidden_dim|caption_projection_dim)$|hidden_sizes?$")
WIDTH = re.compile(
    r"^(d_ff|n_inner|embedding_size|mlp_dim|ffn_dim|time_step_rank)$"
    r"|intermediate_size$|ffn_dim$|ffn_hidden_size$|lora_rank$|embed_proj_dim$|pooler_output_size$"
)
DEPTH = re.compile(
    r"^(num_hidden_layers|num_(single_|mmdit_|single_dit_)?layers|n_layers?|encoder_layers|decoder_layers|depth)$"
)
VOCABULARY, SPECIAL = "vocab_size", re.compile(r"_(token|index)_id$|^pad_index$")
SMALL_VOCABULARY, SMALL_HEAD, SMALL_WIDTH = 512, 16, 32
DEPTHS = (4, 8, 16)
MULTIPLE = 8
"""Widths are whole multiples of it, as grouped matrix products ask for."""


def shrunken(config: Config) -> Iterator[Config]:
    """Smaller configurations, the smallest first; those that keep a head's size come last."""
    heads, within = divisors(config)
    depth = max((v for k, v in sizes(config) if DEPTH.search(k)), default=0)
    seen = set()
    for layers in (*(d for d in DEPTHS if d < depth), depth):
        for divide_heads, divide_within in ((heads, within), (heads, 1), (1, within)):
            if (layers, divide_heads, divide_within) not in seen:
                seen.add((layers, divide_heads, divide_within))
                yield divided(config, divide_heads, divide_within, layers, depth)


def divisors(config: Config) -> tuple[int, int]:
    """By what head counts and what lies within a head can be divided: the heads' common divisor, a power of two."""
    counts = [v for k, v in sizes(config) if HEADS.search(k)]
    streams = [v for k, v in sizes(config) if STREAM.search(k)]
    heads = math.gcd(*counts) if counts else 1
    if counts and max(counts) == heads:
        heads //= next((p for p in (2, 3, 5, 7) if heads % p == 0), 1)  # some heads stay
    explicit = [v for k, v in sizes(config) if WITHIN_HEAD.search(k)]
    implied = [max(streams) // max(counts)] if counts and streams and not explicit else []
    least = SMALL_HEAD if counts else SMALL_WIDTH
    smallest = min([*explicit, *implied] or streams or [least])
    within = 1
    while smallest % (2 * within) == 0 and smallest // (2 * within) >= least:
        within *= 2
    return heads, within


def sizes(config: Config) -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration by its name, also those in lists and in nested configurations."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from sizes(value)
        else:
            numbers = value if isinstance(value, list) else [value]
            yield from ((key, n) for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 0)


def divided(config: Config, heads: int, within: int, layers: int, depth: int) -> Config:
    return {key: smaller(key, value, heads, within, layers, depth) for key, value in config.items()}


def smaller(key: str, value: Any, heads: int, within: int, layers: int, depth: int) -> Any:
    """One entry of a configuration, shrunk if its name says that it is a size."""
    if isinstance(value, dict):
        return divided(value, heads, within, layers, depth)
    if isinstance(value, list):
        kept = value[:layers] if len(value) == depth and depth > layers else value
        return [smaller(key, item, heads, within, layers, depth) for item in kept]
    number = isinstance(value, int) and not isinstance(value, bool)
    return smaller_number(key, value, heads, within, layers) if number else value


def smaller_number(key: str, value: int, heads: int, within: int, layers: int) -> int:
    if limit := limit_of(key, layers):
        return min(value, limit)
    if HEADS.search(key):
        return max(1, value // heads)
    if WITHIN_HEAD.search(key):
        return max(1, value // within)
    if STREAM.search(key):
        return max(1, math.ceil(value / (heads * within)))
    return MULTIPLE * math.ceil(value / (heads * within * MULTIPLE)) if WIDTH.search(key) else value


def limit_of(key: str, layers: int) -> int:
    """The most that an entry may be, 0 where there is no such limit."""
    if DEPTH.search(key):
        return layers
    if key == VOCABULARY:
        return SMALL_VOCABULARY
    return SMALL_VOCABULARY - 1 if SPECIAL.search(key) else 0
