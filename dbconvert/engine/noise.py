"""From a noise rule to the noise that training uses."""

from __future__ import annotations

import torch
from torch import Tensor

from dbconvert.diffusion.distributions import LogNormal, Tabulated
from dbconvert.diffusion.entropy import fit_entropy
from dbconvert.diffusion.intervals import boundaries
from dbconvert.errors import UsageError
from dbconvert.plan import NoiseFit, NoiseRule

EDM = LogNormal()
EDM_SIGMA_DATA = 0.5
UNIFORM = "uniform labels and a random unit-norm table; fitted to the data before training"


def fit_noise(rule: NoiseRule, blocks: int, table: Tensor | None, frequencies: Tensor | None, basis: str) -> NoiseFit:
    """Applies a rule.

    Args:
        table: targets [K, d] for `auto`.
        frequencies: of the labels [K]; None counts them as equally frequent.
        basis: what the table and the frequencies are, in words.

    Raises:
        UsageError: the rule's options contradict each other.
    """
    if rule.rule == "edm":
        return edm_noise(rule, blocks)
    if rule.p_mean is not None or rule.p_std is not None:
        raise UsageError("p_mean and p_std belong to noise `edm`", hint="add --noise edm, or leave them out")
    if table is None:
        raise UsageError("noise `auto` needs a table of discrete targets", hint="use --noise edm")
    frequencies = torch.ones(len(table)) if frequencies is None else frequencies
    fit = fit_entropy(table, frequencies)
    distribution = Tabulated(
        fit.distribution.log_sigma,
        fit.distribution.mass,
        rule.sigma_min or fit.distribution.sigma_min,
        rule.sigma_max or fit.distribution.sigma_max,
    )
    return NoiseFit(
        rule="auto",
        basis=basis,
        boundaries=tuple(boundaries(distribution, blocks, rule.partition)),
        overlap=rule.overlap,
        sigma_data=rule.sigma_data or fit.sigma_data,
        log_sigma=distribution.log_sigma,
        mass=distribution.mass,
        entropy=fit.entropy,
    )


def edm_noise(rule: NoiseRule, blocks: int) -> NoiseFit:
    distribution = LogNormal(
        EDM.p_mean if rule.p_mean is None else rule.p_mean,
        EDM.p_std if rule.p_std is None else rule.p_std,
        rule.sigma_min or EDM.sigma_min,
        rule.sigma_max or EDM.sigma_max,
    )
    return NoiseFit(
        rule="edm",
        basis="the log-normal of EDM",
        boundaries=tuple(boundaries(distribution, blocks, rule.partition)),
        overlap=rule.overlap,
        sigma_data=rule.sigma_data or EDM_SIGMA_DATA,
        p_mean=distribution.p_mean,
        p_std=distribution.p_std,
    )
