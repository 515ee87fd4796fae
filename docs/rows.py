"""Measured rows by name and seed, in a JSON file beside the script that measures them."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {"versions": {name: version(name) for name in ("dbconvert", "torch")}, "rows": {}}


def keep(path: Path, name: str, seed: str, row: dict[str, Any]) -> None:
    """Read again before it is written: several seeds may be measured at once."""
    results = read(path)
    by_seed = results["rows"].setdefault(name, {})
    by_seed[seed] = row
    results["rows"][name] = dict(sorted(by_seed.items()))
    path.write_text(json.dumps(results, indent=1) + "\n")


def titled(name: str, by_seed: dict[str, Any], rows: dict[str, Any]) -> str:
    """A row's name, with its seeds where other rows have more."""
    lacks = set().union(*rows.values()) - set(by_seed)
    return f"{name} (seed {', '.join(by_seed)})" if lacks else name
