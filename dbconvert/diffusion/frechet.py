"""The Frechet distance between two sets of features (Heusel et al. 2017, eq. 6), each taken as a Gaussian.

d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). Shapes: N examples of d features.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from scipy.linalg import LinAlgWarning, sqrtm
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean [d] and covariance [d, d] (unbiased) of `count` examples, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor
    count: int

    @property
    def deficient(self) -> bool:
        """Whether the covariance has no full rank, for want of examples: its rank is at most N - 1."""
        return self.count <= len(self.mean)


class Gatherer:
    """Moments of features that come in batches, merged as Chan et al. (1983) do: no large sums are subtracted."""

    def __init__(self) -> None:
        self.count, self.mean, self.scatter = 0, torch.zeros(()), torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Takes features [N, d]."""
        features = features.detach().to("cpu", torch.float64)
        if not self.count:
            width = features.shape[1]
            self.mean, self.scatter = features.new_zeros(width), features.new_zeros(width, width)
        added, total = len(features), self.count + len(features)
        mean = features.mean(0)
        centred, shift = features - mean, mean - self.mean
        self.scatter += centred.T @ centred + shift.outer(shift) * (self.count * added / total)
        self.mean = self.mean + shift * (added / total)
        self.count = total

    def moments(self) -> Moments:
        """Raises ValueError for fewer than two examples, which have no covariance."""
        if self.count < 2:
            raise ValueError(f"{self.count} examples have no covariance")
        return Moments(self.mean, self.scatter / (self.count - 1), self.count)


def frechet_distance(first: Moments, second: Moments) -> float:
    """The squared distance d^2, which is what is reported as FID.

    Raises:
        ValueError: the two have different numbers of features.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"{len(first.mean)} and {len(second.mean)} features cannot be compared")
    apart = float((first.mean - second.mean).square().sum())
    spread = float(first.covariance.trace() + second.covariance.trace())
    return apart + spread - 2 * trace_of_root(first.covariance, second.covariance)


def trace_of_root(first: Tensor, second: Tensor) -> float:
    """tr (C_1 C_2)^(1/2), as tr (R C_2 R)^(1/2) with R = C_1^(1/2): symmetric, so that a covariance without full rank
    has a root too."""
    root = symmetric_root(first)
    product = root @ second @ root
    return float(symmetric_root((product + product.T) / 2).trace())


def symmetric_root(matrix: Tensor) -> Tensor:
    """The root of a symmetric positive semidefinite matrix, which has one though it be singular; what rounding makes
    imaginary of it is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)
        return torch.as_tensor(sqrtm(matrix.numpy()).real)
