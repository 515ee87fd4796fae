"""MAUVE (Pillutla et al. 2021): how near a network's texts are to those of the data, between 0 and 1."""

from __future__ import annotations

from typing import Any

import torch

from dbconvert.errors import UsageError
from dbconvert.sources.readers import Reader

SCALING = 0.2
"""The paper's scaling factor; mauve-text's own default is 5, and scores under different ones cannot be compared."""


def mauve_module() -> Any:
    """The `mauve` package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import mauve
    except ImportError:
        raise UsageError("eval.mauve needs the package mauve-text", hint="pip install 'dbconvert[mauve]'") from None
    return mauve


def mauve_score(module: Any, reader: Reader, data: list[str], written: list[str], seed: int) -> float:
    """Of texts of the data and of a network, by a reader's features of them."""
    of_data, of_written = (torch.stack([reader.feature(text) for text in texts]).numpy() for texts in (data, written))
    found = module.compute_mauve(
        p_features=of_data, q_features=of_written, mauve_scaling_factor=SCALING, seed=seed % 2**31, verbose=False
    )
    return float(found.mauve)
