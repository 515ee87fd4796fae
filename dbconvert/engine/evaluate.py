"""eval: how good a trained network is, on a part of its data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dbconvert.data.batches import Data
from dbconvert.data.datasets import BUILT_IN
from dbconvert.data.examples import LABEL
from dbconvert.data_options import DataOptions
from dbconvert.engine.generated import generated
from dbconvert.engine.likeness import likeness
from dbconvert.engine.load import Loaded, load
from dbconvert.engine.memory import failed
from dbconvert.engine.metrics import Metrics, Scorer
from dbconvert.engine.reading import find_tokenizer, open_examples
from dbconvert.errors import UsageError
from dbconvert.events import Reporter, Stage, silent
from dbconvert.graph.values import example_shape
from dbconvert.overrides import merge, parse_overrides
from dbconvert.recipe import EvalOptions, SampleOptions
from dbconvert.schema import parse, to_data


@dataclass(frozen=True)
class Evaluation:
    """Figures of a network on `part` of `source`, over `examples` examples."""

    source: str
    part: str
    examples: int
    metrics: Metrics


def evaluate(
    target: str,
    *,
    part: str | None = None,
    model: str | None = None,
    overrides: Iterable[str] = (),
    seed: int = 0,
    report: Reporter = silent,
) -> Evaluation:
    """Evaluates a checkpoint or a run.

    Args:
        part: of the data; its test part by default, else its validation part.
        model: the network's Python file, where it does not lie beside the checkpoint.
        overrides: `data.KEY=value` and `eval.KEY=value`.

    Raises:
        UsageError: no data is known for it.
    """
    report(Stage("loading"))
    loaded = load(target, model)
    data, options = with_overrides(loaded.data, overrides, checkpoint=Path(target).is_file())
    part = part or data.test or data.validation
    if part is None:
        raise UsageError("which part of the data?", hint="name it with --part")
    plan = loaded.network.plan
    tokenizer = loaded.tokenizer if data.tokenizer is None else find_tokenizer(data, plan, None)
    examples = open_examples(data, part, plan, tokenizer, report)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draws = loaded.network.task.generative
    made = likeness(loaded, examples, data, options, seed, device, report) if draws else {}
    loaded.network.to(device)
    made = made if draws else generated(loaded, examples, tokenizer, options, seed, report)
    report(Stage("evaluating"))
    metrics = {**figures(loaded, examples, data, options, seed), **made}
    return Evaluation(str(data.source), part, min(len(examples), options.examples or len(examples)), metrics)


def with_overrides(
    data: DataOptions, overrides: Iterable[str], *, checkpoint: bool
) -> tuple[DataOptions, SampleOptions]:
    """The data and evaluation options with `key=value` applied.

    A checkpoint's metadata may name a built-in source only: it never decides what code or files are opened. The
    tokenizer is the one that was kept, unless another is given.
    """
    given = parse_overrides(overrides)
    unknown = set(given) - {"data", "eval"}
    if unknown:
        raise UsageError(f"unknown key {sorted(unknown)[0]}", hint="eval takes data.KEY=value and eval.KEY=value")
    asked = "source" in given.get("data", {})
    if checkpoint and not asked and data.source not in BUILT_IN:
        raise UsageError(f"the checkpoint was trained on {data.source}", hint="give the data with data.source=...")
    if checkpoint and data.latents is not None and "latents" not in given.get("data", {}):
        hint = "give it with data.latents.vae=..."
        raise UsageError(f"the checkpoint was trained on latents of {data.latents.vae}", hint=hint)
    place = "the command line"
    latents = replace(data.latents, cache=None) if checkpoint and data.latents is not None else data.latents
    known = replace(data, tokenizer=None, cache=None, latents=latents)
    merged = parse(DataOptions, merge(to_data(known), given.get("data", {})), file=place)
    return merged, parse(SampleOptions, given.get("eval", {}), file=place)


def figures(loaded: Loaded, examples: Data, data: DataOptions, options: EvalOptions, seed: int) -> Metrics:
    device = next(loaded.network.parameters()).device
    scorer = Scorer(loaded.network, loaded.intervals, options, data.image, device, seed)
    try:
        return scorer.score(examples, loaded.layers)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        refuse_other_shapes(error, loaded, examples)
        raise


def refuse_other_shapes(error: Exception, loaded: Loaded, examples: Data) -> None:
    """Raises what is wrong with the data, if the network was split on other shapes."""
    network = loaded.network
    first = {name: value for name, value in examples.__getitems__([0]).items() if name != LABEL}
    seen = {given.name: example_shape(given) for given in network.plan.anatomy.inputs}
    if any(tuple(value.shape[1:]) != seen[name] for name, value in first.items() if name in seen):
        raise failed(error, first, network) from error
