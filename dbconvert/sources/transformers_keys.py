"""Keys of Transformers checkpoints: what is stored under which name, and how it becomes the network's own tensors.

Transformers renames and fuses tensors while it loads them (ViT's layers, GPT-NeoX's head, experts) and adds or drops
the prefix of the base model. Its own tables are read here, so that every checkpoint it loads is understood.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dbconvert.errors import DBConvertError


class KeyMap:
    """The keys of one network, which may be on the meta device.

    Args:
        model: a PreTrainedModel, as its class built it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.state: dict[str, Tensor] = model.state_dict()

    def renamed(self, keys: Iterable[str]) -> Iterator[tuple[str, str, str | None, Any]]:
        """(stored key, network key, pattern, converter) in natural order; the last two are None for plain names."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        table = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self.model.base_model_prefix
        for key in sorted(keys, key=dot_natural_key):
            home, pattern = rename_source_key(key, renamings, converters, prefix, self.state)
            if home not in self.state and key in self.state:
                home, pattern = key, None
            yield key, home, pattern, by_pattern.get(pattern)

    def homes(self, keys: Iterable[str]) -> dict[str, str]:
        return {key: home for key, home, _, _ in self.renamed(keys)}

    def to_network(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors, real or on meta, as the network's own.

        Raises:
            DBConvertError: tensors that belong together do not fit each other.
        """
        found: dict[str, Tensor] = {}
        groups: dict[str, Any] = {}
        for key, home, pattern, converter in self.renamed(tensors):
            if home not in self.state:
                continue
            if converter is None:
                found[home] = tensors[key]
                continue
            group = groups.setdefault(home, copy.deepcopy(converter))
            group.add_tensor(home, key, pattern, tensors[key])
        for home, group in groups.items():
            for name, value in self.converted(group, home).items():
                found[name] = value[0] if isinstance(value, list) else value
        return found

    @torch.no_grad()
    def converted(self, group: Any, home: str) -> dict[str, Any]:
        given = {key for keys in group.layer_targets.values() for key in keys}
        result: dict[str, Any] = {}
        reason = ""
        try:
            result = group.convert(home, model=self.model, config=self.model.config)
        except Exception as error:
            reason = str(error).split("\n", 1)[0]
        if reason or differs(result.get(home), self.state[home]):
            absent = sorted(self.parts_of(home) - given)
            if absent or reason:
                raise DBConvertError(
                    f"{home} cannot be put together from the stored tensors",
                    where=", ".join(sorted(given)[:4]),
                    why=f"missing: {', '.join(absent[:4])}" if absent else reason,
                    hint="copy or download the checkpoint again",
                )
        return result

    def parts_of(self, home: str) -> set[str]:
        """Stored keys that make up a network tensor, under the names that are written today; empty if not known."""
        try:
            return set(self.to_stored({home: self.state[home]}))
        except Exception:
            return set()

    @torch.no_grad()
    def to_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, Tensor] = revert_weight_conversion(self.model, dict(tensors))
        return found

    def adjusted(self, missing: set[str], unknown: set[str]) -> tuple[set[str], set[str]]:
        """The missing and unknown keys without those that the network's class says do not matter."""
        from transformers.utils.loading_report import LoadStateDictInfo

        info = LoadStateDictInfo(set(missing), set(unknown), set(), [], {}, set())
        self.model._adjust_missing_and_unexpected_keys(info)
        return info.missing_keys, info.unexpected_keys


def differs(value: Any, wanted: Tensor) -> bool:
    """Whether a converted tensor is there and has another shape than the network's."""
    tensor = value[0] if isinstance(value, list) else value
    return isinstance(tensor, Tensor) and tensor.shape != wanted.shape
