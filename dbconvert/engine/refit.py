"""Noise fitted again while all blocks train together: when, to what, and where it cannot be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dbconvert.data.batches import Data, derive, seed_all
from dbconvert.data.examples import LABEL, Batch
from dbconvert.diffusion.distributions import Tabulated
from dbconvert.diffusion.intervals import boundaries
from dbconvert.diffusion.refit import levels_of, refit
from dbconvert.engine.cascade import at_rest
from dbconvert.engine.metrics import Scorer
from dbconvert.engine.package import NOISE
from dbconvert.engine.runs import read_info, write_info
from dbconvert.engine.shares import cross_entropies
from dbconvert.errors import UsageError
from dbconvert.files import write_text
from dbconvert.plan import NoiseFit, NoiseRule, Plan
from dbconvert.recipe import Recipe
from dbconvert.schema import to_json

LABELS = 4096
"""Labels of the training data, about, that the cross-entropy is measured on."""


def refuse_refit(rule: NoiseRule) -> None:
    """Raises UsageError for set points that are none, and for rules that are not fitted."""
    if not rule.refit:
        return
    if rule.rule != "auto":
        raise UsageError(
            f"noise.refit fits noise `auto` again, and this one is `{rule.rule}`",
            hint="leave it out: only targets in a table have a cross-entropy that noise can be fitted to",
        )
    ascending = all(a < b for a, b in zip(rule.refit, rule.refit[1:], strict=False))
    if not (ascending and rule.refit[0] > 0 and rule.refit[-1] < 1):
        told = ", ".join(f"{share:g}" for share in rule.refit)
        raise UsageError(
            f"noise.refit [{told}] are not shares of the training, one after the other",
            hint="give numbers between 0 and 1 that ascend, e.g. [0.25, 0.5]",
        )


def refuse_alone(plan: Plan, recipe: Recipe) -> None:
    """Raises UsageError where blocks are trained independently: each would have to know what the others have learnt."""
    if plan.noise.refit and recipe.train.method == "blocks" and recipe.train.periphery == "frozen-target":
        raise UsageError(
            "noise.refit needs all blocks trained together, and train.periphery=frozen-target trains them apart",
            hint="leave noise.refit out, where blocks are to be independent jobs",
        )
    if plan.noise.refit and recipe.train.method == "blocks" and recipe.train.order == "stagewise":
        raise UsageError(
            "noise.refit gives blocks other levels, and train.order=stagewise has finished the first ones by then",
            hint="leave noise.refit out, or train with another train.order",
        )


def points(shares: Iterable[float], updates: int) -> frozenset[int]:
    """After which updates noise is fitted again.

    Raises:
        UsageError: nothing would be trained after the last of them.
    """
    found = frozenset(max(1, int(share * updates)) for share in shares)
    if found and max(found) >= updates:
        raise UsageError(f"noise.refit needs updates after it, and there is {updates} in all", hint="leave it out")
    return found


@dataclass(frozen=True)
class Some:
    """Some examples of a part of the data."""

    examples: Data
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.examples.__getitems__([self.indices[index] for index in indices])

    def label_counts(self) -> Tensor:
        return self.examples.label_counts()


def sample_of(examples: Data, seed: int) -> Some:
    """The same examples at every set point of a run: as many as have about LABELS labels."""
    seed_all(derive(seed, "refit"))  # for random transforms of the user's own dataset
    labels = examples.__getitems__([0])[LABEL].numel()
    generator = torch.Generator().manual_seed(derive(seed, "refit"))
    order: list[int] = torch.randperm(len(examples), generator=generator).tolist()
    return Some(examples, order[: -(-LABELS // labels)])


def refitted(before: NoiseFit, rule: NoiseRule, scorer: Scorer, examples: Data, updates: int) -> NoiseFit:
    """The noise after so many updates, from the network's cross-entropy on a sample of the training data.

    sigma_data stays: the network's preconditioning is made of it. A sigma_min or sigma_max that was given stays too.
    The fit stays as it is where the cross-entropy does not depend on the noise yet.
    """
    distribution = before.distribution()
    some = sample_of(examples, scorer.seed)
    levels, seed = levels_of(distribution).tolist(), derive(scorer.seed, "refit", "noise")
    with at_rest(scorer.network):
        batches = scorer.batches(some)
        found = cross_entropies(scorer.network, before.intervals(), batches, levels, draws=1, seed=seed)
    fitted = refit(distribution, torch.tensor(found, dtype=torch.float64))
    if fitted is None:
        return before
    kept = Tabulated(
        fitted.log_sigma,
        fitted.mass,
        distribution.sigma_min if rule.sigma_min else fitted.sigma_min,
        distribution.sigma_max if rule.sigma_max else fitted.sigma_max,
    )
    return replace(
        before,
        basis=f"the network's own cross-entropy after update {updates} of the run, on training data",
        boundaries=tuple(boundaries(kept, len(before.boundaries) - 1, rule.partition)),
        log_sigma=kept.log_sigma,
        mass=kept.mass,
    )


def keep(folder: Path, noise: NoiseFit) -> None:
    """Puts the noise in force into a run's folder."""
    write_text(folder / NOISE, to_json(noise))
    write_info(folder, replace(read_info(folder), noise=noise.identity))


def told(before: NoiseFit, after: NoiseFit) -> str:
    """What changed, in words; the range apart."""
    if after == before:
        return "noise stays as it is: the cross-entropy does not rise with sigma yet"
    levels = ", ".join(f"{level:.3g}" for level in after.boundaries)
    found = f"noise refitted to {after.basis}: boundaries {levels}"
    ends = (("sigma_min", 0), ("sigma_max", -1))
    moved = [
        f"{name} from {before.boundaries[end]:.3g} to {after.boundaries[end]:.3g}"
        for name, end in ends
        if before.boundaries[end] != after.boundaries[end]
    ]
    return f"{found}; {' and '.join(moved)}, beyond which next to nothing changes" if moved else f"{found}; same range"
