"""The data of a plan: which examples its task reads, and the tokenizer that makes them of text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dbconvert.anatomy import Anatomy
from dbconvert.data.batches import Data
from dbconvert.data.datasets import open_part, refuse_text
from dbconvert.data.examples import LABEL, Examples
from dbconvert.data.latents import open_latents
from dbconvert.data.sequences import Blank, Sequences
from dbconvert.data.tagged import Tagged
from dbconvert.data.tokenizer_opening import open_tokenizer
from dbconvert.data.tokenizers import Tokenizer
from dbconvert.data.tokens import open_text
from dbconvert.data_options import DataOptions
from dbconvert.engine.convert import task_of
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Reporter, silent
from dbconvert.graph.values import example_shape
from dbconvert.plan import Plan
from dbconvert.recipe import Recipe
from dbconvert.tasks.registry import named


def is_text(plan: Plan) -> bool:
    return plan.task is not None and named(plan.task).text


def find_tokenizer(data: DataOptions, plan: Plan, model: Path | None) -> Tokenizer | None:
    """What makes tokens for a plan; None where its task reads no text.

    Args:
        model: the source's folder, whose tokenizer is taken where the data options name none.
    """
    return open_tokenizer(data, model) if is_text(plan) else None


def open_examples(
    data: DataOptions,
    part: str,
    plan: Plan,
    tokenizer: Tokenizer | None,
    report: Reporter = silent,
    *,
    training: bool = False,
) -> Data:
    """One part of the data as the plan's task reads it.

    Args:
        training: it will be trained on; latents are drawn anew then.

    Raises:
        UsageError, DBConvertError: there is no such part, it cannot be read, or it does not fit the network.
    """
    assert plan.target is not None
    if not is_text(plan):
        refuse_text(data)
    if named(str(plan.task)).tagged:
        return Tagged(open_part(data, part), data, as_read(plan), plan.target)
    if tokenizer is None:
        pictures = Examples(open_part(data, part), data, as_read(plan), plan.target.classes)
        if data.latents is None:
            return pictures
        return open_latents(pictures, latent_argument(plan), data, training=training, report=report)
    text, aside = open_text(data, part, tokenizer, report), named(str(plan.task)).aside
    return Sequences(text, token_argument(plan), plan.target.classes, aside=aside)


def latent_argument(plan: Plan) -> str:
    """Raises UsageError for networks that draw no images, whose pictures are not encoded."""
    if plan.anatomy.picture is None or not named(str(plan.task)).generative:
        raise UsageError("data.latents is for networks that draw images", hint="leave it out")
    return plan.anatomy.picture.argument


def as_read(plan: Plan) -> Anatomy:
    """The anatomy with the inputs that the data has to give, and no others."""
    read = task_of(plan).read
    return replace(plan.anatomy, inputs=tuple(given for given in plan.anatomy.inputs if given.name in read))


def token_argument(plan: Plan) -> str:
    if plan.anatomy.embedding is None:
        raise DBConvertError("the network takes no tokens")
    return plan.anatomy.embedding.argument


def stand_in(recipe: Recipe, plan: Plan) -> Data:
    """A batch in the shape of the split's example input, to measure memory without data."""
    assert plan.target is not None
    if is_text(plan):
        seen = next(given.shape[1] for given in plan.anatomy.inputs if given.name == token_argument(plan))
        return Blank(token_argument(plan), recipe.train.batch, recipe.data.length or seen)
    anatomy = as_read(plan)
    item: dict[str, Any] = {
        given.name: torch.zeros(example_shape(given), dtype=getattr(torch, given.dtype)) for given in anatomy.inputs
    }
    options = DataOptions(label=LABEL)
    task = task_of(plan)
    if task.tagged:
        labels = task.stand_in({name: value[None] for name, value in item.items()})[0]
        return Tagged([{**item, LABEL: labels}] * recipe.train.batch, options, anatomy, plan.target)
    return Examples([{**item, LABEL: 0}] * recipe.train.batch, options, anatomy, plan.target.classes)
