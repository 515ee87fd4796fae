"""The built-in `pydoc`: Python's own help topics, half a million characters that ship with Python, in fixed parts.

The text is the installed Python's: other versions have slightly different topics.
"""

from __future__ import annotations

from dbconvert.data.parts import deal

PARTS = {"train": (0, 80), "validation": (80, 90), "test": (90, 100), "all": (0, 100)}


def topic_rows(part: str) -> list[dict[str, str]]:
    """One part: {text} of whole topics, dealt out by their names."""
    from pydoc_data.topics import topics

    return [{"text": topics[name]} for name in deal({name: len(text) for name, text in topics.items()}, PARTS[part])]
