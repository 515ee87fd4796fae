"""What the sampler itself brings to a block, for the examples of a batch that are trained on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.sampling import draw_tokens, euler_step, levels
from dbconvert.engine.chunks import piece_by_piece
from dbconvert.engine.listening import Arrival
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.tasks.base import Task, along


@dataclass
class Said:
    """One evaluation of a block, without gradient.

    Args:
        features: what entered its head, [N, S, d].
    """

    network: BlockwiseNetwork
    block: int
    features: Tensor

    @cached_property
    def expected(self) -> Tensor:
        """The target that it expects, [N, S, d]."""
        return self.made(partial(self.network.task.expected, self.network.model))

    def drawn(self, generator: torch.Generator | None) -> Tensor:
        """A token for every position, [N, S]."""
        return self.made(partial(draw_tokens, temperature=1.0, generator=generator))

    def made(self, make: Callable[[Tensor], Tensor]) -> Tensor:
        read = partial(self.network.read, self.block)
        return piece_by_piece(read, make, self.features, self.network.task.target.classes)


def evaluated(network: BlockwiseNetwork, block: int, here: Arrival) -> Said:
    hold: list[Tensor] = []
    network.denoise(block, here.inputs, here.z, here.sigma, hold, here.heard, tells=True)
    return Said(network, block, hold[0])


@dataclass
class OwnState(ABC):
    """The sampler's state on its way to a block: a cascade lets each earlier block meet it, and moves it on.

    Args:
        block: where it goes.
        own: the examples that have it, [N] bool; the others are handed on as they are.
        generator: of draws, on the CPU; None is torch's own.
    """

    network: BlockwiseNetwork
    intervals: Intervals
    block: int
    own: Tensor
    generator: torch.Generator | None = None

    @property
    @abstractmethod
    def first(self) -> int:
        """The first block that has to run for it."""

    def level(self, block: int, level: Tensor) -> Tensor:
        """Where an earlier block that would run at `level` [N] or [N, S] runs."""
        return level

    def meet(self, block: int, here: Arrival) -> Arrival:
        """What reaches an earlier block."""
        return here

    @abstractmethod
    def move(self, here: Arrival, said: Said) -> None:
        """Goes on after an earlier block."""

    @abstractmethod
    def arrive(self, there: Arrival) -> Arrival:
        """What reaches the block at last."""


@dataclass
class Denoised(OwnState):
    """Euler steps towards the expected target at the levels of the usual grid, from z = 0 at sigma_max on.

    The last block meets it twice: at its upper level, and at sigma_min after a step of its own.
    """

    z: Tensor | None = None
    grid: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.grid = levels(self.intervals)

    @property
    def first(self) -> int:
        return 0

    def meet(self, block: int, here: Arrival) -> Arrival:
        state = torch.zeros_like(here.z) if self.z is None else self.z
        z = torch.where(along(self.own, here.z), state, here.z)
        return replace(here, z=z, sigma=torch.where(along(self.own, here.sigma), self.grid[block], here.sigma))

    def move(self, here: Arrival, said: Said) -> None:
        self.z = euler_step(here.z, said.expected, self.grid[said.block], self.grid[said.block + 1])

    def arrive(self, there: Arrival) -> Arrival:
        met = self.meet(self.block, there)
        again = self.own & (there.sigma < met.sigma).reshape(len(self.own), -1).any(-1)
        if not again.any():
            return met
        self.move(met, evaluated(self.network, self.block, met))
        assert self.z is not None
        return replace(there, z=torch.where(along(again, met.z), self.z, met.z))


@dataclass
class Shown(OwnState):
    """Tokens that the block before shows between a time of its own and the block's, as it draws them.

    It sets out from the truth at an even time of that block: a text that is drawn from t = 1 on would have nothing to
    do with the labels.
    """

    tokens: Tensor | None = None

    @property
    def first(self) -> int:
        return max(0, self.block - 1)

    def level(self, block: int, level: Tensor) -> Tensor:
        if block != self.block - 1:
            return level
        low, high = self.intervals.owned(block)
        drawn = low + torch.rand(len(level), generator=self.generator).to(level) * (high - low)
        return torch.where(self.own, drawn, level)

    def move(self, here: Arrival, said: Said) -> None:
        if said.block == self.block - 1:
            shown = here.z & self.own[:, None]
            self.tokens = torch.where(shown, said.drawn(self.generator), here.inputs[self.argument])

    def arrive(self, there: Arrival) -> Arrival:
        """Tokens that are still hidden are not looked at."""
        if self.tokens is None:
            return there
        return replace(there, inputs={**there.inputs, self.argument: self.tokens})

    @property
    def argument(self) -> str:
        embedding = self.network.plan.anatomy.embedding
        assert embedding is not None
        return embedding.argument


def own_state(task: Task) -> type[OwnState]:
    return Shown if task.rule == "mask" else Denoised


def own_levels(task: Task, intervals: Intervals, block: int, sigma: Tensor, own: Tensor) -> Tensor:
    """sigma [N] or [N, S] with that of the examples `own` [N] at the levels where the sampler meets a block.

    It passes all times where tokens are hidden; else the usual grid, which meets the last block at two levels: one of
    them is drawn.
    """
    if task.rule == "mask":
        return sigma
    grid = levels(intervals)
    at = torch.full((len(sigma),), grid[block])
    if block == intervals.blocks - 1:
        at = torch.where(torch.rand(len(sigma)) < 0.5, grid[-1], at)
    return torch.where(along(own, sigma), along(at.to(sigma), sigma), sigma)
