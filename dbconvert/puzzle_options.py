"""What recipes may say of the built-in puzzles."""

from __future__ import annotations

from dbconvert.schema import Positive, record


@record
class PuzzleOptions:
    """Of the built-in puzzles, whose examples are made when they are asked for.

    Args:
        size: elements of `s3` (12), points of `permutation-powers` (12), cells of `automaton` (24).
        steps: the highest power of `permutation-powers` (8); steps of `automaton` (4), or the lowest and the highest
            number of them, of which each example is told its own.
        single: only the answer that takes all steps has a label: that of the last position, of the highest power, of
            one cell.
        examples: of the training part, which an epoch goes through (200,000).
    """

    size: Positive | None = None
    steps: Positive | tuple[Positive, Positive] | None = None
    single: bool = False
    examples: Positive | None = None
