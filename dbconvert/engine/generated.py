"""How good what a network of text writes is, beside the data's own text after the same prompts."""

from __future__ import annotations

import math

import torch

from dbconvert.data.batches import Data
from dbconvert.data.sequences import Sequences
from dbconvert.data.tokenizers import Tokenizer
from dbconvert.engine.load import Loaded
from dbconvert.engine.mauve_score import mauve_module, mauve_score
from dbconvert.engine.metrics import Metrics
from dbconvert.engine.repeats import distinct_2, repetition
from dbconvert.engine.samples import Samples, draw_samples
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Reporter, Stage, silent
from dbconvert.recipe import SampleOptions
from dbconvert.sources.readers import Reader, open_reader
from dbconvert.tasks.masked_lm import MaskedLM

OF_TEXT = ("prompt", "tokens", "temperature", "top_p", "teacher", "mauve")
OF_IMAGES = ("features", "guidance")


def generated(
    loaded: Loaded,
    examples: Data,
    tokenizer: Tokenizer | None,
    options: SampleOptions,
    seed: int = 0,
    report: Reporter = silent,
) -> Metrics:
    """Figures of `options.samples` samples, none without.

    `distinct_2` and `repetition` as `repeats.py` has them; `teacher_perplexity` of a token of the teacher's; `_data` is
    the same of the data's own continuations. `mauve` compares the two, prompts included.

    Raises:
        UsageError: what is asked for makes no sense, or needs a package that is not installed.
        DBConvertError: a model cannot be read, or reads no texts of that length.
    """
    refuse(loaded, options)
    if not options.samples:
        return {}
    if tokenizer is None or not isinstance(examples, Sequences):
        raise UsageError("eval.samples is for networks of text", hint="leave it out")
    device = next(loaded.network.parameters()).device
    module = mauve_module() if options.mauve else None
    teacher = open_reader(options.teacher, scores=True, device=device) if options.teacher else None
    reader = open_reader(options.mauve, scores=False, device=device) if options.mauve else None
    samples = draw_samples(loaded, examples, tokenizer, options, seed, report)
    found = {
        "distinct_2": distinct_2(samples.written),
        "distinct_2_data": distinct_2(samples.data),
        "repetition": repetition(samples.written),
        "repetition_data": repetition(samples.data),
    }
    report(Stage("reading samples"))
    prompts, written, data = texts_of(samples, tokenizer)
    if teacher is not None:
        found["teacher_perplexity"] = perplexity(teacher, prompts, written)
        found["teacher_perplexity_data"] = perplexity(teacher, prompts, data)
    if reader is not None:
        of_data, of_written = ([a + b for a, b in zip(prompts, texts, strict=True)] for texts in (data, written))
        found["mauve"] = mauve_score(module, reader, of_data, of_written, seed)
    return found


def refuse(loaded: Loaded, options: SampleOptions) -> None:
    """Raises UsageError for options that contradict each other, or the network."""
    refuse_strangers(options, OF_TEXT, OF_IMAGES)
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UsageError("eval.temperature must not be negative, and eval.top_p lies in (0, 1]")
    if options.samples and options.top_p < 1 and isinstance(loaded.network.decided_task, MaskedLM):
        raise UsageError("top-p is for networks that write one token at a time", hint="use eval.temperature")


def refuse_strangers(options: SampleOptions, known: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Raises UsageError for options about samples of another kind, or about samples where none are asked for."""
    default = SampleOptions()
    changed = {name for name in (*known, *others) if getattr(options, name) != getattr(default, name)}
    for name in others:
        if name in changed:
            raise UsageError(f"eval.{name} does not apply to this network", hint="leave it out")
    for name in known:
        if name in changed and not options.samples:
            raise UsageError(f"eval.{name} is about samples, and none are asked for", hint="add eval.samples=100")


def texts_of(samples: Samples, tokenizer: Tokenizer) -> tuple[list[str], list[str], list[str]]:
    """Prompts, what the network wrote and what the data has, N texts each."""
    prompts, written, data = (
        [tokenizer.decode(row) for row in tokens.tolist()]
        for tokens in (samples.prompts, samples.written, samples.data)
    )
    return prompts, written, data


@torch.no_grad()
def perplexity(teacher: Reader, prompts: list[str], texts: list[str]) -> float:
    """Of a token of the teacher's own, over all texts."""
    read = [teacher.nats(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    tokens = sum(count for _, count in read)
    if not tokens:
        raise DBConvertError("the teacher's tokenizer finds no tokens in the samples", where=teacher.location)
    return math.exp(sum(nats for nats, _ in read) / tokens)
