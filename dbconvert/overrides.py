"""Single values of a recipe, given beside its file as `key=value` with dotted keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from dbconvert.errors import UsageError
from dbconvert.schema import Key


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """{"train": {"steps": 3}} from ["train.steps=3"]; values are YAML."""
    nested: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{text!r} is not an override", hint="write it as key=value, e.g. train.steps=300")
        place = nested
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"the value of {key} is not YAML: {value!r}") from None
    return nested


def without_displaced(data: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The file's keys without the length of training that the overrides give in the other unit."""
    train, over = data.get("train"), given.get("train")
    if not isinstance(train, dict) or not isinstance(over, dict):
        return data
    pairs = {"steps": "epochs", "epochs": "steps"}
    displaced = {other for key, other in pairs.items() if key in over and other not in over}
    return {**data, "train": {key: value for key, value in train.items() if key not in displaced}}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below or {}, value) if isinstance(value, dict) and isinstance(below or {}, dict) else value
    return merged


def keys(nested: Mapping[str, Any], path: Key = ()) -> Iterator[Key]:
    """The path of every key in nested mappings, parents too."""
    for key, value in nested.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys(value, (*path, key))
