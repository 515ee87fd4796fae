"""From a noise rule to the noise that training uses."""

from __future__ import annotations

import torch
from torch import Tensor

from dbconvert.diffusion.distributions import LogNormal, Tabulated
from dbconvert.diffusion.entropy import EntropyFit, closed_form, fit_entropy
from dbconvert.diffusion.intervals import boundaries
from dbconvert.errors import UsageError
from dbconvert.plan import NoiseFit, NoiseRule, Target
from dbconvert.tasks.base import Task

EDM = LogNormal()
EDM_SIGMA_DATA = 0.5
EDM_HINT = "leave it out: it is `edm`, whose sigma_data, p_mean and p_std can be set"
LARGEST_TABLE = 2**20
"""Numbers in a made-up table; larger ones are told by a closed form."""
UNIFORM = "uniform labels and a random unit-norm table; fitted to the data before training"


def fit_noise(rule: NoiseRule, blocks: int, table: Tensor | None, frequencies: Tensor | None, basis: str) -> NoiseFit:
    """Applies a rule.

    Args:
        table: targets [K, d], or [L, K, d] of several labels, for `auto`.
        frequencies: of the labels, [K] or [L, K]; None counts them as equally frequent.
        basis: what the table and the frequencies are, in words.

    Raises:
        UsageError: the rule's options contradict each other.
    """
    if rule.rule == "edm":
        return edm_noise(rule, blocks)
    if rule.rule == "mask":
        return mask_noise(rule, blocks)
    refuse_others(rule)
    if table is None:
        raise UsageError("noise `auto` needs a table of discrete targets", hint="use --noise edm")
    frequencies = torch.ones(table.shape[:-1]) if frequencies is None else frequencies
    return auto_noise(rule, blocks, fit_entropy(table, frequencies), basis)


def preview_noise(rule: NoiseRule, blocks: int, target: Target) -> NoiseFit:
    """What `auto` will about give, before there is data: for equally frequent labels and a random table."""
    if target.labels * target.classes * target.width > LARGEST_TABLE:
        refuse_others(rule)
        return auto_noise(rule, blocks, closed_form(target.classes, target.width, target.labels), UNIFORM)
    shape = (target.classes, target.width) if target.labels == 1 else (target.labels, target.classes, target.width)
    random = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return fit_noise(rule, blocks, torch.nn.functional.normalize(random, dim=-1), None, UNIFORM)


def refuse_others(rule: NoiseRule) -> None:
    """Raises UsageError for figures of other rules than `auto`."""
    refuse_idle(rule, ("schedule", "power"), "mask")
    if rule.p_mean is not None or rule.p_std is not None:
        raise UsageError("p_mean and p_std belong to noise `edm`", hint="add --noise edm, or leave them out")


def auto_noise(rule: NoiseRule, blocks: int, fit: EntropyFit, basis: str) -> NoiseFit:
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


def refuse_idle(rule: NoiseRule, options: tuple[str, ...], owner: str) -> None:
    """Raises UsageError for figures that another rule would use."""
    given = [name for name in options if getattr(rule, name) is not None]
    if given:
        raise UsageError(f"{given[0]} belongs to noise `{owner}`, and this one is `{rule.rule}`", hint="leave it out")


def refuse_misfit(rule: NoiseRule, task: type[Task]) -> None:
    """Raises UsageError where a task hides tokens and the rule is noise, or the other way round."""
    if (rule.rule == "mask") != (task.rule == "mask"):
        raise UsageError(f"noise `{rule.rule}` is not for task {task.name}", hint=f"leave it out: it is `{task.rule}`")
    if rule.rule == "auto" and task.rule == "edm":
        raise UsageError(f"noise `auto` is fitted to a table of targets, and task {task.name} has none", hint=EDM_HINT)
    if rule.per == "position" and task.rule == "edm":
        raise UsageError(f"task {task.name} has one level an example", hint="leave noise.per at `example`")


def mask_noise(rule: NoiseRule, blocks: int) -> NoiseFit:
    refuse_idle(rule, ("p_mean", "p_std", "sigma_min", "sigma_max", "sigma_data"), "edm")
    if rule.per == "position":
        raise UsageError("tokens are hidden at one time in all of an example", hint="leave noise.per at `example`")
    masking = rule.masking()
    power = "" if masking.power is None else f", power {masking.power:g}"
    return NoiseFit(
        rule="mask",
        basis=f"tokens are hidden by the {masking.schedule} schedule{power}",
        boundaries=tuple(boundaries(masking, blocks, rule.partition)),
        overlap=rule.overlap,
        sigma_data=1.0,
        schedule=masking.schedule,
        power=masking.power,
    )


def edm_noise(rule: NoiseRule, blocks: int) -> NoiseFit:
    refuse_idle(rule, ("schedule", "power"), "mask")
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
