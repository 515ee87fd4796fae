"""The refusals in docs/will-it-convert.md, as the program gives them for networks of the acceptance table."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    "two_stacks", "hf_swin", "unet", "not_residual", "deferred", "hf_t5_encoder", "early_exit",
    "in_place", "interrupted", "compiled",
)  # fmt: skip
"""Rows of the acceptance table."""


def refusal_parts() -> dict[str, str]:
    """Marked parts of docs/will-it-convert.md by name."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from dbconvert.errors import Refused
    from dbconvert.graph.analysis import analyse
    from dbconvert.graph.proof import prove
    from tests.acceptance.table import ROWS

    parts = {}
    for name in SHOWN:
        model, inputs = ROWS[name].build()
        try:
            prove(model, analyse(model, inputs), inputs)
        except Refused as refusal:
            parts[f"refusal-{name}"] = f"```\nrefused: {refusal}\n```"
        else:
            raise SystemExit(f"{name} is not refused any more: take it out of docs/will-it-convert.md")
    source = (ROOT / "examples" / "highway.py").read_text(encoding="utf-8")
    parts["adapter"] = f"```python\n{source[source.index('def adapter') :].rstrip()}\n```"
    return parts
