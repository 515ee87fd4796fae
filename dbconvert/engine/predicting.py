"""What a network predicts, as it was trained or as the recipe says, and the noise levels that it knows."""

from __future__ import annotations

from dataclasses import replace

from dbconvert.anatomy import Picture
from dbconvert.diffusion.predictions import Prediction, Times
from dbconvert.engine.noise import EDM
from dbconvert.engine.opening import Opened
from dbconvert.errors import UsageError
from dbconvert.plan import NoiseRule, Plan, Target
from dbconvert.recipe import SplitOptions
from dbconvert.tasks.base import Task

ROUNDING = 1e-4
"""Levels this close (relative) to the end of what a network knows are within."""


def decide_prediction(opened: Opened, task: type[Task], options: SplitOptions) -> Prediction:
    """The recipe's word, else what the source says of its trained weights, else EDM's own.

    Raises:
        UsageError: the task predicts no images, or times are given that nothing reads.
    """
    asked = options.prediction is not None or options.times is not None
    if asked and not task.generative:
        raise UsageError(f"split.prediction and split.times are for images, and the task is {task.name}")
    settled = options.prediction is not None and options.times is not None
    told = None if settled or not task.generative or not opened.pretrained else opened.source.prediction()
    kind = options.prediction or (told.kind if told else "edm")
    if kind == "edm" and options.times is not None:
        raise UsageError(
            "split.times is the schedule of a network that predicts epsilon, v or a flow",
            hint="say which with split.prediction",
        )
    return Prediction(kind, options.times or (own_times(told, opened.anatomy.picture) if told else Times()))


def own_times(told: Prediction, picture: Picture | None) -> Times:
    """The times of a flow as the network is given them, where it scales them itself."""
    if told.kind != "flow" or picture is None:
        return told.times
    return replace(told.times, scale=told.times.scale / picture.time_scale)


def within_range(rule: NoiseRule, target: Target | None) -> NoiseRule:
    """The rule with its levels kept to what the network was trained on, where they are left open.

    Raises:
        UsageError: they are not, and reach beyond.
    """
    known = None if target is None else target.prediction.range()
    if known is None or rule.rule != "edm":
        return rule
    low, high = rule.sigma_min or max(EDM.sigma_min, known[0]), rule.sigma_max or min(EDM.sigma_max, known[1])
    if low < known[0] * (1 - ROUNDING) or high > known[1] * (1 + ROUNDING):
        raise UsageError(
            f"noise from sigma {low:.4g} to {high:.4g} reaches beyond what the network was trained on, "
            f"{known[0]:.4g} to {known[1]:.4g}",
            hint="leave sigma_min and sigma_max out, or correct split.times",
        )
    return replace(rule, sigma_min=low, sigma_max=high)


def taken_for(plan: Plan) -> str | None:
    """What the user should know of a pretrained network of which nobody said what it predicts."""
    target = plan.target
    if not plan.pretrained or target is None or target.placement != "image" or target.prediction.kind != "edm":
        return None
    return (
        "the network is taken to be one of EDM's, whose time is ln(sigma)/4: if it was trained to predict epsilon, v "
        "or a flow, say so with split.prediction, and its schedule with split.times"
    )
