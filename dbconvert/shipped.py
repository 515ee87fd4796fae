"""Recipes and examples that come with dbconvert: beside the package in a checkout, inside it when installed."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """Path of a shipped file such as `recipes/vit_digits.yaml`; it need not exist."""
    installed = HERE / "shipped" / name
    return installed if installed.exists() else HERE.parent / name
