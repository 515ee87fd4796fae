"""What the library reports while it works. Only the command line draws these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """A piece of work begins; `total` counts its steps when they are known."""

    name: str
    total: int | None = None


@dataclass(frozen=True)
class Advance:
    """`steps` of the current stage are done; `values` are the figures worth showing."""

    steps: int = 1
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """A fact the user should see; `warning` marks one that deserves attention."""

    text: str
    warning: bool = False


Event = Stage | Advance | Note
Reporter = Callable[[Event], None]


def silent(event: Event) -> None:
    """The reporter of callers who do not want to hear anything."""
