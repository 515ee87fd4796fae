"""A Transformers network: a folder with config.json, a hub id, or a configuration out of a plan."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.errors import DBConvertError
from dbconvert.plan import SourceRef
from dbconvert.sources.base import Source
from dbconvert.sources.transformers_config import (
    FALLBACK,
    architecture,
    code_files,
    code_identity,
    first_line,
    known,
    plain_config,
    read_config,
    read_settings,
    refuse_quantised,
    trusted_class,
    unreadable,
)
from dbconvert.sources.transformers_files import (
    COMPANIONS,
    CONFIG,
    SAFETENSORS,
    STATE_DICTS,
    companions,
    copy_files,
    fetch,
    quiet,
)
from dbconvert.sources.transformers_keys import KeyMap
from dbconvert.sources.twin import shrunken
from dbconvert.weights import Trained, find_weights, open_weights

BATCH, TOKENS = 2, 16
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class TransformersSource(Source):
    """A Transformers architecture, with its trained weights where there are any.

    Args:
        location: folder or hub id as the user gave it; None when the configuration came out of a plan.
        folder: where its files lie; None likewise, unless they travelled with the plan.
        config: a PretrainedConfig.
        name: of the architecture. cls: its class.
        code: Python files of the folder that the class comes from; empty for Transformers' own.
        settings: what config.json says, where code of its own reads it.
    """

    def __init__(
        self,
        location: str | None,
        folder: Path | None,
        config: Any,
        name: str,
        cls: Any,
        code: tuple[str, ...] = (),
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.location, self.folder = location, folder
        self.config, self.name, self.cls = config, name, cls
        self.code, self.settings = code, settings

    @cached_property
    def ref(self) -> SourceRef:
        content = self.settings or plain_config(self.config)
        return SourceRef(
            kind="transformers",
            name=self.name,
            location=self.location or "",
            files=(CONFIG, *self.code),
            sha256=code_identity(self.name, content, self.folder, self.code),
            config=content,
        )

    # -- opening ------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, location: str, *, trust: bool = False) -> TransformersSource:
        """From a folder or a hub id.

        Args:
            trust: run code that comes with it.

        Raises:
            DBConvertError: there is no such configuration, its architecture is not part of Transformers, it needs
                code that is not trusted, or its weights are quantised.
        """
        folder = Path(location)
        if not folder.is_dir():
            folder = fetch(location, (CONFIG, "*.py", *COMPANIONS))
        settings = read_settings(folder / CONFIG, location)
        refuse_quantised(settings, location)
        name = (settings.get("architectures") or [None])[0]
        own_code = bool(settings.get("auto_map"))
        if own_code and not trust and not known(settings, name):
            raise DBConvertError(
                f"{location} brings its own Python code, which is not run unasked",
                where=", ".join(code_files(folder, settings)),
                why=f"Transformers itself has no {name or settings.get('model_type')}",
                hint="read the code, then add --trust-remote-code",
            )
        remote = own_code and trust
        code = code_files(folder, settings) if remote else ()
        config = read_config(folder, location, trust=remote)
        if name is None:
            raise DBConvertError(
                f"the configuration of {location} names no architecture",
                hint='add e.g. "architectures": ["ViTForImageClassification"] to config.json',
            )
        if not remote:
            return cls(location, folder, config, name, architecture(name))
        return cls(location, folder, config, name, trusted_class(folder, settings, name), code, settings)

    @classmethod
    def from_plan(cls, ref: SourceRef, folder: Path | None = None) -> TransformersSource:
        """From the configuration that a plan carries.

        Args:
            folder: holds the code that it needs, of exactly the plan's content; None where it needs none.
        """
        import transformers

        content = ref.config or {}
        if folder is not None:
            config, own = read_config(folder, str(folder), trust=True), trusted_class(folder, content, ref.name)
            return cls(None, folder, config, ref.name, own, ref.files[1:], content)
        fields = {k: v for k, v in content.items() if k != "model_type"}
        try:
            config = transformers.AutoConfig.for_model(content["model_type"], **fields)
        except Exception as error:
            raise unreadable(ref.location, error) from None
        return cls(None, None, config, ref.name, architecture(ref.name))

    def build(self) -> nn.Module:
        with quiet():
            try:
                model: nn.Module = self.cls(self.config)
            except Exception as error:
                raise DBConvertError(
                    f"Transformers cannot build {self.name} from this configuration",
                    where=self.location or "",
                    why=f"{type(error).__name__}: {first_line(error)}",
                    hint=f"correct config.json, or {FALLBACK}",
                ) from error
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False  # a cache would hide keys and values from the tape
        return model.float()

    def twins(self) -> Iterator[Source]:
        for content in shrunken(plain_config(self.config, everything=True)):
            fields = {key: value for key, value in content.items() if key != "model_type"}
            try:
                with quiet():
                    twin = TransformersSource(None, None, type(self.config)(**fields), self.name, self.cls)
            except Exception:  # a configuration checks itself in ways of its own: one that does not fit is no twin
                continue
            yield twin

    def longest(self) -> int | None:
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        limits = (getattr(text, name, None) for name in POSITIONS)
        return next((limit for limit in limits if isinstance(limit, int)), None)

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
        if self.folder is not None:
            copy_files([CONFIG, *companions(self.folder), *self.code], self.folder, folder)
            return
        text = json.dumps({**(self.ref.config or {}), "architectures": [self.name]}, indent=2)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")

    # -- weights ------------------------------------------------------------------------------------------

    def trained(self, *, fetch: bool) -> Trained | None:
        if self.folder is None or self.location is None:
            return None
        remote = fetch and not Path(self.location).is_dir()
        found = fetched_weights(self.location) if remote else find_weights(self.folder)
        return open_weights(found) if found is not None else None

    @cached_property
    def keys(self) -> KeyMap:
        from transformers.initialization import no_init_weights

        with torch.device("meta"), no_init_weights():
            return KeyMap(self.build())

    def homes(self, keys: Iterable[str]) -> dict[str, str]:
        return self.keys.homes(keys)

    def to_network(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.keys.to_network(tensors)

    def to_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.keys.to_stored(tensors)

    def needed(self, missing: set[str]) -> set[str]:
        return self.keys.adjusted(missing, set())[0]

    def telling(self, unknown: set[str]) -> set[str]:
        return self.keys.adjusted(set(), unknown)[1]


def fetched_weights(repository: str) -> Path | None:
    """Downloads a hub repository's weights: safetensors, state_dicts where there are none."""
    return find_weights(fetch(repository, SAFETENSORS)) or find_weights(fetch(repository, STATE_DICTS))
