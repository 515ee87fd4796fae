"""What the sampler itself brings to a block, for the examples of a batch that are trained on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor

from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.sampling import draw_tokens, euler_step, levels
from dbconvert.engine.chunks import piece_by_piece
from dbconvert.engine.listening import Arrival, put
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.tasks.base import Task, along


@dataclass
class Said:
    """One evaluation of a block, without gradient.

    Args:
        output: what the network gave, or what entered its head, [N, S, d], where that is text.
    """

    network: BlockwiseNetwork
    block: int
    output: Tensor

    @cached_property
    def expected(self) -> Tensor:
        """The target that it expects, of the targets' shape."""
        return self.made(partial(self.network.task.expected, self.network.model))

    def drawn(self, generator: torch.Generator | None) -> Tensor:
        """A token for every position, [N, S]."""
        return self.made(partial(draw_tokens, temperature=1.0, generator=generator))

    def made(self, make: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.network.task.text:
            return make(self.output)
        read = partial(self.network.read, self.block)
        return piece_by_piece(read, make, self.output, self.network.task.target.classes)


def evaluated(network: BlockwiseNetwork, block: int, here: Arrival) -> Said:
    hold: list[Tensor] | None = [] if network.task.text else None
    output = network.denoise(block, here.inputs, here.z, here.sigma, hold, here.heard, tells=True)
    return Said(network, block, output if hold is None else hold[0])


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

    A block that the grid meets more than once takes the steps between by itself: the last one, which meets its upper
    level and sigma_min, and a looped core, which serves all levels.
    """

    z: Tensor | None = None
    grid: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.grid = usual(self.network.task, self.intervals)

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
        z = self.meet(self.block, there).z
        level = there.sigma.reshape(len(self.own), -1)[:, 0]
        for here, after in pairwise(met(self.grid, self.intervals, self.block)):
            further = self.own & (level < torch.full_like(level, here))
            if not further.any():
                break
            at = replace(there, z=z, sigma=torch.full_like(there.sigma, here))
            some = at.some(further, self.network.plan.anatomy.axes)
            expected = evaluated(self.network, self.block, some).expected
            z = put(z, further, euler_step(some.z, expected, here, after))
        return replace(there, z=z)


@dataclass
class FromTruth(OwnState):
    """Sets out from the truth, at a level of the block before that is drawn as in training: a state that comes from
    nothing would have nothing to do with the labels."""

    @property
    def first(self) -> int:
        return max(0, self.block - 1)

    def level(self, block: int, level: Tensor) -> Tensor:
        if block != self.block - 1:
            return level
        uniform = torch.rand(len(level), generator=self.generator)
        drawn = self.intervals.distribution.between(*self.intervals.owned(block), uniform).to(level)
        return torch.where(self.own, drawn, level)


@dataclass
class Stepped(FromTruth):
    """One Euler step of the block before, from there to the level of the example."""

    at: Tensor | None = None
    step: tuple[Tensor, Tensor] | None = None

    def move(self, here: Arrival, said: Said) -> None:
        if said.block == self.block - 1:
            self.at, self.step = here.sigma, (here.z, said.expected)

    def arrive(self, there: Arrival) -> Arrival:
        if self.at is None or self.step is None:
            return there
        z = euler_step(*self.step, self.at, there.sigma)
        return replace(there, z=torch.where(along(self.own, z), z, there.z))


@dataclass
class Shown(FromTruth):
    """Tokens that the block before shows between there and the time of the example, as it draws them."""

    tokens: Tensor | None = None

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


def own_state(task: Task | type[Task]) -> type[OwnState]:
    if task.generative:
        return Stepped
    return Shown if task.rule == "mask" else Denoised


def usual(task: Task, intervals: Intervals) -> list[float]:
    """The levels at which a prediction is made unless it is asked for otherwise."""
    return levels(intervals, task.evaluations)


def met(grid: list[float], intervals: Intervals, block: int) -> list[float]:
    """Those at which the sampler meets a block."""
    return [level for level in grid if intervals.block_of(level) == block]


def own_levels(task: Task, intervals: Intervals, block: int, sigma: Tensor, own: Tensor) -> Tensor:
    """sigma [N] or [N, S] with that of the examples `own` [N] at the levels where the sampler meets a block.

    Where tokens are hidden or images made it passes all levels; else those of the usual grid, of which one is drawn
    where it meets the block more than once.
    """
    if own_state(task) is not Denoised:
        return sigma
    grid = met(usual(task, intervals), intervals, block)
    at = torch.full((len(sigma),), grid[0])
    if len(grid) > 1:
        drawn = (torch.rand(len(sigma)) * len(grid)).long()
        at = torch.tensor(grid[::-1])[drawn]
    return torch.where(along(own, sigma), along(at.to(sigma), sigma), sigma)
