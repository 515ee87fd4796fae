"""What tasks with labels share: a table of their embeddings, a linear head that reads the denoised features."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from dbconvert.anatomy import Head
from dbconvert.plan import Context, Rule
from dbconvert.recipe import Z
from dbconvert.tasks.base import Task
from dbconvert.tasks.discrete import above_mean, fresh_table, register_readouts, register_table


class LabelTask(Task):
    """Labels of an example, or of its positions, out of K classes.

    Parameters it adds: `target.weight` [K, d], used L2-normalised so that embeddings cannot collapse, and for each
    block a linear from the conditioning to the shift and scale of the features before the head.
    """

    rule: ClassVar[Rule] = "auto"
    contexts: ClassVar[tuple[Context, ...]] = ("raw", "features", "estimate")
    zs: ClassVar[tuple[Z, ...]] = ("noised", "on-policy", "mixed")

    def register(self, model: nn.Module, *, blocks: int, width: int, seed: int) -> None:
        register_table(model, self.target, seed)
        register_readouts(model, blocks, width, self.target.width)

    def block_of(self, key: str) -> int | None:
        part, _, rest = key.partition(".")
        return int(rest.split(".")[0]) if part == "readout" else None

    def table(self, model: nn.Module) -> Tensor:
        return fresh_table(model)

    def denoised(self, model: nn.Module, output: Tensor) -> Tensor:
        return output.float().softmax(-1) @ self.table(model)

    def told(self, model: nn.Module, expected: Tensor, z: Tensor) -> Tensor:
        """As many vectors as labels: a single one is heard by every position."""
        return above_mean(expected, self.table(model))

    def correct(self, output: Tensor, labels: Tensor) -> Tensor:
        return output.argmax(-1) == labels

    def probabilities(self, output: Tensor) -> Tensor:
        return output.float().softmax(-1)


def unfit(head: Head, width: int) -> str | None:
    """Why a head cannot read the stream, and tell one class from another; None where it can."""
    if head.features != width:
        return f"the head reads {head.features} features, the stream has {width}"
    return "the head has a single output" if head.classes < 2 else None
