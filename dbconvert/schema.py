"""Frozen records that read themselves strictly from JSON and YAML.

An unknown key is an error that shows the file, the line and the nearest known key; so is a value of the wrong
kind. The checking itself is pydantic's.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_type_hints

import pydantic
import yaml

from dbconvert.errors import UsageError

T = TypeVar("T")
Key = tuple[str | int, ...]

Positive = Annotated[int, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=0)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0)]
NotNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A frozen dataclass that refuses unknown keys when it is read."""
    cls.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=False)  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(cls)


# -- reading ------------------------------------------------------------------------------------------------


def parse(cls: type[T], data: Any, *, file: str, places: Mapping[Key, str] | None = None) -> T:
    """`data` as a record of class `cls`.

    Args:
        file: named in errors.
        places: where each key stands (`file:line`), where that is known.

    Raises:
        UsageError: an unknown key, a missing one or a value of the wrong kind.
    """
    try:
        return pydantic.TypeAdapter(cls).validate_python(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = tuple(part for part in first["loc"] if not _is_union_branch(part))
        raise _explain(cls, key, first, (places or {}).get(key, file)) from None


def _is_union_branch(part: Any) -> bool:
    """pydantic names the members of a union in its locations; no key looks like these."""
    if isinstance(part, str) and (part.startswith("constrained-") or any(c in part for c in "[](")):
        return True
    return part in ("int", "str", "float", "bool")


def _explain(cls: type, key: Key, problem: Any, where: str) -> UsageError:
    dotted = ".".join(map(str, key))
    if problem["type"] == "unexpected_keyword_argument":
        known = known_keys(cls, key[:-1])
        close = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"known keys here: {', '.join(known)}"
        return UsageError(f"unknown key {dotted}", where=where, hint=hint)
    if problem["type"] in ("missing", "missing_argument"):
        return UsageError(f"{dotted} is missing", where=where)
    return UsageError(f"{dotted} = {problem['input']!r}: {_lower(problem['msg'])}", where=where)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def known_keys(cls: type, path: Key) -> list[str]:
    """Names of the fields of the record that sits at `path` inside `cls`."""
    for part in path:
        hint = get_type_hints(cls).get(str(part))
        options = [hint, *get_args(hint)]
        cls = next((o for o in options if dataclasses.is_dataclass(o) and isinstance(o, type)), type(None))
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """A YAML mapping and where each of its keys stands, as `file:line`.

    Raises:
        UsageError: no such file, not YAML, or not a mapping.
    """
    text = read_text(path)
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UsageError(f"cannot read {path.name}: {problem}", where=f"{path}{line}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path.name} is not a mapping of keys to values", where=str(path))
    return data, {key: f"{path}:{line}" for key, line in _lines(node, ())}


def _lines(node: yaml.Node | None, path: Key) -> Iterator[tuple[Key, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, key.value)
            yield below, key.start_mark.line + 1
            yield from _lines(value, below)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*path, i), value.start_mark.line + 1
            yield from _lines(value, (*path, i))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}", why=str(error)) from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path.name} is not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None


# -- writing ------------------------------------------------------------------------------------------------


def to_data(value: Any) -> Any:
    """A record as plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_data(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_data(v) for v in value]
    return value


def to_json(value: Any) -> str:
    return json.dumps(to_data(value), indent=2, ensure_ascii=False) + "\n"


def to_yaml(value: Any) -> str:
    text: str = yaml.safe_dump(to_data(value), sort_keys=False, allow_unicode=True, width=100)
    return text


def identity(value: Any) -> str:
    """SHA-256 of the canonical JSON of a record: equal content, equal identity."""
    canonical = json.dumps(to_data(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
