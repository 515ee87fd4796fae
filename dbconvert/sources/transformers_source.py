"""A Transformers network: a folder with config.json, a hub id, or a configuration out of a plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbconvert.errors import DBConvertError
from dbconvert.graph.account import parameter_bytes
from dbconvert.graph.fake import empty_weights
from dbconvert.plan import SourceRef
from dbconvert.schema import identity
from dbconvert.sources.base import Source
from dbconvert.sources.twin import shrunken

BATCH, TOKENS = 2, 16
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


class TransformersSource(Source):
    """A Transformers architecture, with its trained weights where there are any.

    Args:
        location: folder or hub id; None when the configuration came out of a plan.
        config: a PretrainedConfig.
    """

    def __init__(self, location: str | None, config: Any, name: str) -> None:
        self.location = location
        self.config = config
        self.cls = architecture(name)
        self.name = name

    @cached_property
    def ref(self) -> SourceRef:
        content = plain_config(self.config)
        return SourceRef(
            kind="transformers",
            name=self.name,
            location=self.location or "",
            files=("config.json",),
            sha256=identity({"architecture": self.name, "config": content}),
            config=content,
        )

    @classmethod
    def open(cls, location: str) -> TransformersSource:
        """From a folder or a hub id.

        Raises:
            DBConvertError: there is no such configuration, or its architecture is not part of Transformers.
        """
        import transformers

        with quiet():
            try:
                config = transformers.AutoConfig.from_pretrained(location)
            except (OSError, ValueError, KeyError) as error:
                reason = str(error).strip().split("\n", 1)[0]
                raise DBConvertError(
                    f"cannot read a Transformers configuration from {location}",
                    why=reason,
                    hint="give a folder with config.json, a hub id, or a model.py",
                ) from None
        names = getattr(config, "architectures", None) or []
        if not names:
            raise DBConvertError(
                f"the configuration of {location} names no architecture",
                hint='add e.g. "architectures": ["ViTForImageClassification"] to config.json',
            )
        return cls(location, config, names[0])

    @classmethod
    def from_config(cls, content: dict[str, Any], name: str) -> TransformersSource:
        """From the configuration that a plan carries; no file is read and no code executed."""
        import transformers

        fields = {k: v for k, v in content.items() if k != "model_type"}
        return cls(None, transformers.AutoConfig.for_model(content["model_type"], **fields), name)

    def build(self) -> nn.Module:
        with quiet():
            model: nn.Module = self.cls(self.config)
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False  # a cache would hide keys and values from the tape
        return model.float()

    def build_within(self, limit: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]), empty_weights():
            model = self.build()
        return model if parameter_bytes(model.parameters()) > limit else self.build()

    def weights_location(self) -> str | None:
        return self.location if self.location is not None and self.has_weights() else None

    def twins(self) -> Iterator[Source]:
        for content in shrunken(plain_config(self.config, everything=True)):
            try:
                with quiet():
                    twin = TransformersSource.from_config(content, self.name)
            except Exception:  # a configuration checks itself in ways of its own: one that does not fit is no twin
                continue
            yield twin

    def longest(self) -> int | None:
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        limits = (getattr(text, name, None) for name in POSITIONS)
        return next((limit for limit in limits if isinstance(limit, int)), None)

    def load_weights(self, model: nn.Module) -> str | None:
        if self.weights_location() is None:
            return None
        with quiet():
            trained = self.cls.from_pretrained(self.location, config=self.config, dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
        return self.location

    def has_weights(self) -> bool:
        folder = Path(self.location or "")
        if folder.is_dir():
            return any((folder / name).exists() for name in WEIGHT_FILES)
        from huggingface_hub import file_exists

        return any(file_exists(str(self.location), name) for name in WEIGHT_FILES)

    def example_inputs(self, model: nn.Module) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        name = getattr(model, "main_input_name", "input_ids")
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        if name == "input_ids":
            limit = getattr(text, "max_position_embeddings", None) or TOKENS
            shape = (BATCH, min(TOKENS, limit))
            inputs = {name: torch.randint(0, text.vocab_size, shape, generator=generator)}
            if getattr(self.config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = inputs[name].clone()
            return inputs
        if name == "pixel_values":
            vision = getattr(self.config, "vision_config", self.config)
            size = getattr(vision, "image_size", 224)
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            channels = getattr(vision, "num_channels", 3)
            return {name: torch.randn(BATCH, channels, height, width, generator=generator)}
        raise DBConvertError(
            f"no example input is known for {name}",
            where=self.name,
            hint="write a model.py with build_model() and example_inputs() around it",
        )

    def copy_to(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**(self.ref.config or {}), "architectures": [self.name]}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def architecture(name: str) -> Any:
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None:
        raise DBConvertError(
            f"the installed Transformers {transformers.__version__} has no {name}",
            hint="update Transformers, or write a model.py that builds the network; remote code is not run",
        )
    return cls


def plain_config(config: Any, *, everything: bool = False) -> dict[str, Any]:
    """What differs from the defaults of a configuration, or everything, as JSON data; nothing of this machine."""
    content = json.loads(config.to_json_string(use_diff=not everything))
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"):
        content.pop(key, None)
    return {"model_type": config.model_type, **content}


@contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and remarks of Transformers and of the hub's client are off meanwhile."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    level, bars, hub_level = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
