"""Every class of three kinds that the installed Transformers has, built tiny, with an example input."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto import CONFIG_MAPPING, modeling_auto

from tests.acceptance import overrides
from tests.acceptance.shrink import TOKENS, shrunken

KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
LENGTH = 12
LARGEST = 30_000_000
"""More parameters than this were not shrunken, and would take the sweep too long."""


class NotBuilt(Exception):
    """No shrunken configuration builds a network that runs."""


def class_of(kind: str, model_type: str) -> str:
    name = KINDS[kind][model_type]
    return name if isinstance(name, str) else name[0]


def build(kind: str, model_type: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny network in eval mode and the arguments of its forward.

    Raises:
        NotBuilt: with the reason of the first configuration that came furthest.
    """
    cls = getattr(transformers, class_of(kind, model_type))
    failures: list[Exception] = []
    try:
        default = fitting(CONFIG_MAPPING[model_type](**overrides.START.get(model_type, {})), cls)
        # A class for causal language modelling may be an encoder otherwise.
        decoding = {"is_decoder": True} if kind == "causal" and hasattr(default, "is_decoder") else {}
        for config in shrunken(default, overrides.CHANGES.get(default.model_type, {}) | decoding):
            if isinstance(config, Exception):
                failures.append(config)
                continue
            try:
                return attempt(cls, config, kind, model_type)
            except Exception as error:
                failures.append(error)
    except Exception as error:
        failures.append(error)
    error = failures[0]
    raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


def fitting(config: PretrainedConfig, cls: type[nn.Module]) -> PretrainedConfig:
    """The configuration inside a composite one that the class is made from, as Transformers' Auto classes take it."""
    if isinstance(config, cls.config_class):
        return config
    inner = [getattr(config, name) for name in type(config).sub_configs]
    return next((sub for sub in inner if isinstance(sub, cls.config_class)), config)


def attempt(
    cls: type[nn.Module], config: PretrainedConfig, kind: str, model_type: str
) -> tuple[nn.Module, dict[str, Any]]:
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"still {size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = cls(config).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    overrides.PREPARE.get(model_type, lambda _: None)(model)
    inputs = example(model, kind) | overrides.INPUTS.get(model_type, lambda _: {})(model)
    with torch.no_grad():
        model(**inputs)
    return model, inputs


def example(model: nn.Module, kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    config = model.config
    takes = inspect.signature(model.forward).parameters
    if kind == "image" and "pixel_values" in takes:
        size = getattr(config, "image_size", None) or 64
        for sub in type(config).sub_configs:
            size = getattr(getattr(config, sub), "image_size", size)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)}
    name = "input_ids" if "input_ids" in takes else model.main_input_name
    known = min(TOKENS, getattr(config.get_text_config(), "vocab_size", None) or TOKENS)
    return {name: torch.randint(3, known - 20, (2, LENGTH), generator=generator)}
