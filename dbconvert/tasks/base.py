"""What a task answers. To add one: subclass Task in a file of its own and list it in registry.py.

Shapes: N examples, d width of the stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dbconvert.anatomy import Anatomy
from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.plan import Rule, Target

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Corruption:
    """Noisy targets on their way into a block: z = y + sigma eps [N, d], sigma [N], condition [N, width]."""

    z: Tensor
    sigma: Tensor
    condition: Tensor
    scaling: Preconditioning


class Task(ABC):
    """A task acts at two points of a forward pass: on the stream as it enters the stack, and before the head."""

    name: ClassVar[str]
    rule: ClassVar[Rule]
    """Default noise rule: `auto` for discrete targets, `edm` for continuous ones."""

    def __init__(self, anatomy: Anatomy, target: Target) -> None:
        self.anatomy = anatomy
        self.target = target

    @staticmethod
    @abstractmethod
    def refusal(anatomy: Anatomy) -> str | None:
        """Why this task cannot use such a network; None if it can."""

    @staticmethod
    @abstractmethod
    def decide(anatomy: Anatomy) -> Target:
        """The target for a network that the task accepts."""

    @abstractmethod
    def register(self, conditioning: nn.Module, *, blocks: int, width: int, seed: int) -> None:
        """Adds the task's own parameters to a converted network's conditioning."""

    @abstractmethod
    def block_of(self, key: str) -> int | None:
        """The block that owns a parameter that `register` added, None for the periphery."""

    @abstractmethod
    def table(self, conditioning: nn.Module) -> Tensor:
        """The targets as training uses them, [K, d]."""

    @abstractmethod
    def entry(self, corruption: Corruption) -> Change:
        """What happens to the stream as it enters the stack."""

    @abstractmethod
    def exit(self, conditioning: nn.Module, block: int, corruption: Corruption) -> Change:
        """What happens to the features before the head: D = c_skip z + c_out F."""

    @abstractmethod
    def clean(self, conditioning: nn.Module, labels: Tensor) -> Tensor:
        """Clean targets y [N, d] of labels [N]."""

    @abstractmethod
    def denoised(self, conditioning: nn.Module, output: Tensor) -> Tensor:
        """The network's output as an estimate of the clean target, [N, d]."""

    @abstractmethod
    def losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Loss of each example, [N], unweighted."""

    @abstractmethod
    def correct(self, output: Tensor, labels: Tensor) -> Tensor:
        """Whether each example is right, [N], bool."""

    @abstractmethod
    def average(self, outputs: list[Tensor]) -> Tensor:
        """One output from several noise draws."""


def leaf(output: Any, path: tuple[int | str, ...]) -> Tensor:
    """The tensor at `path` of a network's output."""
    for key in path:
        output = output[key]
    tensor: Tensor = output
    return tensor
