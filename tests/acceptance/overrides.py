"""What the general rules cannot know about single configurations: fields to set, inputs to give, calls to make.

Every entry says why. Keys are Transformers' model types.
"""

from __future__ import annotations

from typing import Any

CHANGES: dict[str, dict[str, Any]] = {}
