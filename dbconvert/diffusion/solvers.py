"""Ways from noise to an image along the probability flow dz/dsigma = (z - D)/sigma, one network evaluation at a time.

A solver names the levels of all evaluations beforehand, so that the caller can bring each block to the device once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from dbconvert.diffusion.distributions import NoiseDistribution
from dbconvert.diffusion.sampling import Grid, euler_step, sigma_grid

SolverName = Literal["euler", "heun", "dpmpp-2m"]


@dataclass
class Course:
    """A batch on its way.

    Args:
        kept: what a solver remembers of earlier evaluations.
    """

    z: Tensor
    kept: tuple[Tensor, ...] = field(default=())


class Solver(ABC):
    """One way through a descending grid of levels, and on to zero.

    Args:
        grid: descending levels.
    """

    def __init__(self, grid: list[float]) -> None:
        self.grid = grid

    def next(self, point: int) -> float:
        return self.grid[point + 1] if point + 1 < len(self.grid) else 0.0

    @property
    def levels(self) -> list[float]:
        """The level of every evaluation, in order."""
        return self.grid

    @abstractmethod
    def move(self, course: Course, evaluation: int, denoised: Tensor) -> Course:
        """Where a batch is after an evaluation of this number at its z, which gave D(z, level)."""


class Euler(Solver):
    def move(self, course: Course, evaluation: int, denoised: Tensor) -> Course:
        return Course(euler_step(course.z, denoised, self.grid[evaluation], self.next(evaluation)))


class Heun(Solver):
    """EDM's algorithm 1 without churn: all moves but the last are corrected at their end."""

    @property
    def levels(self) -> list[float]:
        return [self.grid[0], *(level for level in self.grid[1:] for _ in range(2))]

    def move(self, course: Course, evaluation: int, denoised: Tensor) -> Course:
        point = (evaluation + 1) // 2
        if evaluation % 2:
            begun, slope = course.kept
            step = self.grid[point] - self.grid[point - 1]
            return Course(begun + step * (slope + (course.z - denoised) / self.grid[point]) / 2)
        level = self.grid[point]
        slope = (course.z - denoised) / level
        return Course(euler_step(course.z, denoised, level, self.next(point)), (course.z, slope))


class MultistepDPM(Solver):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) for alpha = 1: D is extrapolated from the last two by ln sigma."""

    def move(self, course: Course, evaluation: int, denoised: Tensor) -> Course:
        level, following = self.grid[evaluation], self.next(evaluation)
        estimate = denoised
        if course.kept and following:
            last, step = math.log(self.grid[evaluation - 1] / level), math.log(level / following)
            estimate = denoised + step / (2 * last) * (denoised - course.kept[0])
        return Course(euler_step(course.z, estimate, level, following), (denoised,))


SOLVERS: dict[SolverName, type[Solver]] = {"euler": Euler, "heun": Heun, "dpmpp-2m": MultistepDPM}


def solver(name: SolverName, distribution: NoiseDistribution, evaluations: int, grid: Grid) -> Solver:
    """A solver of at most so many network evaluations; Heun's are two a point of the grid, less one."""
    points = (evaluations + 1) // 2 if name == "heun" else evaluations
    return SOLVERS[name](sigma_grid(distribution, points, grid))
