"""Paths in recipes and requests, made independent of the working directory."""

from __future__ import annotations

from pathlib import Path

from dbconvert.data.datasets import BUILT_IN


def settled(value: str | None, base: Path) -> str | None:
    """An absolute path where `value` names something that exists under `base`; otherwise the value itself.

    `file.py:name` keeps its name; built-in data sources and hub ids stay as they are.
    """
    if value is None or value in BUILT_IN:
        return value
    file, colon, name = value.partition(".py:")
    path = (base / (file + ".py" if colon else file)).resolve()
    return str(path) + (f":{name}" if colon else "") if path.exists() else value
