"""The `auto` noise rule: a noise distribution fitted to a table of discrete targets.

F(sigma) = H(y | y + sigma eps) / H(y) is the share of the label's entropy that is still open at noise sigma,
under nearest-embedding decoding with the label frequencies as prior. F rises from 0 to 1 and serves as a CDF:
levels are drawn from it, and equal steps of it give every block the same information to resolve. The masked
form's equal decrements of alpha are the same rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dbconvert.diffusion.distributions import LogNormal, Tabulated, interpolate
from dbconvert.errors import DBConvertError

OPEN_AT_MIN, OPEN_AT_MAX = 0.005, 0.995
GRID_POINTS = 96
DRAWS = 2048
LARGE, LEAST_DRAWS = 2**24, 64
"""Numbers in a table, or in its posterior, beyond which precision and draws give way."""
AT_ONCE = 2**18
"""Numbers of the posterior that are held at once."""
SPREAD = 0.55
"""Standard deviation of ln sigma under F, for random tables."""
DIGITS = 6
"""Fits are rounded to this many digits, so that block jobs on other machines agree on them."""


@dataclass(frozen=True)
class EntropyFit:
    """A fitted distribution, the scale of its targets and the entropy (nats) it resolves."""

    distribution: Tabulated
    sigma_data: float
    entropy: float


def rms_deviation(table: Tensor, frequencies: Tensor) -> float:
    """Root mean square deviation of the targets from their mean, a coordinate. table [K, d], frequencies [K]."""
    prior = frequencies.double() / frequencies.double().sum()
    centred = table.double() - prior @ table.double()
    return math.sqrt(float(prior @ centred.square().mean(1)))


def posterior_entropy(table: Tensor, frequencies: Tensor, log_sigma: Tensor, *, draws: int, seed: int) -> Tensor:
    """H(y | y + sigma eps) in nats on a grid of ln sigma, by Monte Carlo. Returns [len(log_sigma)], float64."""
    kind = torch.float64 if table.numel() <= LARGE else torch.float32
    table, prior = table.detach().cpu().to(kind), (frequencies.cpu().double() / float(frequencies.sum())).to(kind)
    draws = min(draws, max(LEAST_DRAWS, LARGE // len(table)))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(prior, draws, replacement=True, generator=generator)
    eps = torch.randn(draws, table.shape[1], generator=generator, dtype=kind)
    entropies = torch.zeros(len(log_sigma), dtype=torch.float64)
    rows = max(1, AT_ONCE // len(table))
    for here, noisy in zip(labels.split(rows), eps.split(rows), strict=True):  # type: ignore[no-untyped-call]
        # z . e / sigma^2 with z = y + sigma eps, so that the two products are made once for the whole grid.
        energy, noise = table[here] @ table.T - 0.5 * table.square().sum(1), noisy @ table.T
        for i, sigma in enumerate(log_sigma.double().exp().tolist()):
            log_posterior = (energy / sigma**2 + noise / sigma + prior.log()).log_softmax(1)
            entropies[i] -= (log_posterior.exp() * log_posterior.clamp(min=-1e3)).sum(1).mean() * (len(here) / draws)
    return entropies


def closed_form(classes: int, width: int, labels: int = 1) -> EntropyFit:
    """About what `fit_entropy` gives for many equally frequent classes and a random unit-norm table, without the table.

    F is nearly log-normal then, around 1.25 / sqrt(2 H), whatever the width (fitted to Monte Carlo of 10 to 20,000
    classes).

    Args:
        classes: K. width: d. labels: L.
    """
    entropy = math.log(classes)
    normal = LogNormal(math.log(1.25 / math.sqrt(2 * entropy)), SPREAD, 1e-3, 1e3)
    ends = normal.icdf(torch.tensor([OPEN_AT_MIN, OPEN_AT_MAX]).double())
    log_sigma = torch.linspace(math.log(float(ends[0])) - 0.1, math.log(float(ends[1])) + 0.1, GRID_POINTS).double()
    fitted = Tabulated(
        log_sigma=tuple(round(v, DIGITS) for v in log_sigma.tolist()),
        mass=tuple(round(v, DIGITS) for v in normal.cdf(log_sigma.exp()).tolist()),
        sigma_min=significant(float(ends[0])),
        sigma_max=significant(float(ends[1])),
    )
    return EntropyFit(fitted, significant((labels / width) ** 0.5), significant(labels * entropy))


def fit_entropy(table: Tensor, frequencies: Tensor, *, seed: int = 0) -> EntropyFit:
    """Fits F(sigma) to a table of targets.

    A target that is the sum of L labels' embeddings is taken to open them one by one, each with the others known: exact
    where the labels' embeddings are orthogonal to each other's, too little entropy else.

    Args:
        table: [K, d], as it is used in training (normalised), or [L, K, d].
        frequencies: [K] or [L, K], counts or probabilities of the labels; labels of frequency 0 are left out.
        seed: of the Monte Carlo draws.

    Raises:
        DBConvertError: fewer than two labels occur, so that there is nothing to resolve.
    """
    tables, counts = table.detach().reshape(-1, *table.shape[-2:]), frequencies.reshape(-1, table.shape[-2])
    occur = [(rows[count > 0], count[count > 0]) for rows, count in zip(tables, counts, strict=True)]
    parts = [(rows, count) for rows, count in occur if len(rows) > 1]
    if not parts:
        raise DBConvertError(
            f"noise `auto` needs at least two labels that occur, found {max(len(rows) for rows, _ in occur)}",
            hint="look at the labels of the training data, or use --noise edm",
        )
    deviation = math.sqrt(sum(rms_deviation(*part) ** 2 for part in parts))
    spread = math.log(deviation / math.sqrt(len(parts)) * math.sqrt(table.shape[-1]))
    log_sigma = spread + torch.linspace(math.log(1e-3), math.log(1e2), GRID_POINTS, dtype=torch.float64)
    entropy = torch.stack([posterior_entropy(*part, log_sigma, draws=DRAWS, seed=seed) for part in parts]).sum(0)
    still_open = entropy.cummax(0).values
    still_open = still_open / still_open[-1]
    rising = still_open + torch.arange(GRID_POINTS).double() * 1e-12
    ends = interpolate(torch.tensor([OPEN_AT_MIN, OPEN_AT_MAX]).double(), rising, log_sigma).exp()
    sigma_min, sigma_max = (significant(end) for end in ends.tolist())
    # One grid point beyond each end suffices.
    first = int((log_sigma < math.log(sigma_min)).sum()) - 1
    last = int((log_sigma <= math.log(sigma_max)).sum()) + 1
    rounded = Tabulated(
        log_sigma=tuple(round(v, DIGITS) for v in log_sigma[first:last].tolist()),
        mass=tuple(round(v, DIGITS) for v in still_open[first:last].tolist()),
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )
    priors = [count.double() / float(count.sum()) for _, count in parts]
    label_entropy = sum(float(-(prior * prior.log()).sum()) for prior in priors)
    return EntropyFit(rounded, significant(deviation), significant(label_entropy))


def significant(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
