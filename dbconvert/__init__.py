"""dbconvert: converts a residual network into DiffusionBlocks form and trains it one block at a time.

The public API is the command line's verbs: `inspect`, `estimate`, `split`, `train`, `assemble`, `evaluate`,
`compare`, `generate`, `sample` and `load`, and `Adapter`, with which a model.py says what its layers are. They are
imported when first used, so that `import dbconvert` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbconvert.anatomy import Adapter
    from dbconvert.engine.assemble import assemble
    from dbconvert.engine.compare import compare
    from dbconvert.engine.estimate import estimate
    from dbconvert.engine.evaluate import evaluate
    from dbconvert.engine.generate import generate
    from dbconvert.engine.load import load
    from dbconvert.engine.opening import inspect
    from dbconvert.engine.sample import sample
    from dbconvert.engine.split import split
    from dbconvert.engine.train import train

__all__ = [
    "Adapter", "assemble", "compare", "estimate", "evaluate", "generate", "inspect", "load", "sample", "split", "train",
]  # fmt: skip

_HOMES = {
    "Adapter": "dbconvert.anatomy",
    "assemble": "dbconvert.engine.assemble",
    "compare": "dbconvert.engine.compare",
    "estimate": "dbconvert.engine.estimate",
    "evaluate": "dbconvert.engine.evaluate",
    "generate": "dbconvert.engine.generate",
    "inspect": "dbconvert.engine.opening",
    "load": "dbconvert.engine.load",
    "sample": "dbconvert.engine.sample",
    "split": "dbconvert.engine.split",
    "train": "dbconvert.engine.train",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module dbconvert has no attribute {name}")
