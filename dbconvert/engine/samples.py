"""Samples of a trained network of text beside the data's own: both continue the same prompts.

Shapes: N samples, P tokens of a prompt, T tokens that follow it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dbconvert.data.sequences import Sequences
from dbconvert.data.tokenizers import Tokenizer
from dbconvert.engine.generate import Decoding, Writer, can_cache, plain_rows
from dbconvert.engine.load import Loaded
from dbconvert.engine.recur import recurrent_rows
from dbconvert.engine.unmask import unmask
from dbconvert.errors import UsageError
from dbconvert.events import Advance, Reporter, Stage
from dbconvert.recipe import SampleOptions
from dbconvert.tasks.masked_lm import MaskedLM
from dbconvert.tasks.recurrent import Recurrent

LEAST = 4
"""Tokens of the shortest continuation that can repeat itself."""


@dataclass(frozen=True)
class Samples:
    """prompts [N, P], and what the network and the data follow them with, [N, T] each; long, on the CPU."""

    prompts: Tensor
    written: Tensor
    data: Tensor


def prompts_of(examples: Sequences, options: SampleOptions) -> tuple[Tensor, Tensor]:
    """[N, P] and [N, T]: beginnings of examples and what follows in the data.

    Raises:
        UsageError: there are not so many examples of that length.
    """
    length = examples.text.length
    prompt = options.prompt or max(1, length // 2)
    tokens = options.tokens or length - prompt
    if tokens < LEAST:
        raise UsageError(f"{tokens} tokens after a prompt of {prompt} are too few to judge", hint=f"at least {LEAST}")
    if prompt + tokens > length:
        raise UsageError(
            f"a prompt of {prompt} tokens and {tokens} after it are more than an example's {length}",
            hint="lower eval.prompt or eval.tokens, or raise data.length",
        )
    found = examples.beginnings(options.samples, prompt + tokens)
    if len(found) < options.samples:
        raise UsageError(
            f"{options.samples} samples need as many examples of {prompt + tokens} tokens, and there are {len(found)}",
            hint="lower eval.samples, or shorten them with eval.prompt and eval.tokens",
        )
    return found[:, :prompt], found[:, prompt:]


def draw_samples(
    loaded: Loaded, examples: Sequences, tokenizer: Tokenizer, options: SampleOptions, seed: int, report: Reporter
) -> Samples:
    """Lets a network continue prompts from the data. An end token ends no sample: the data goes on after it too."""
    prompts, data = prompts_of(examples, options)
    device = next(loaded.network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    parts = prompts.split(options.batch)  # type: ignore[no-untyped-call]
    report(Stage("writing samples", len(parts) * data.shape[1]))
    written = []
    for some in parts:
        rows = continued(loaded, some.to(device), data.shape[1], tokenizer, options, generator, report)
        written.append(torch.stack(list(counted(rows, report)), 1).cpu())
    return Samples(prompts, torch.cat(written), data)


def counted(rows: Iterator[Tensor], report: Reporter) -> Iterator[Tensor]:
    for row in rows:
        report(Advance())
        yield row


@torch.no_grad()
def continued(
    loaded: Loaded,
    start: Tensor,
    count: int,
    tokenizer: Tokenizer,
    options: SampleOptions,
    generator: torch.Generator,
    report: Reporter,
) -> Iterator[Tensor]:
    """`count` tokens, [N] each, after every row of `start` [N, P]."""
    if isinstance(loaded.network.task, MaskedLM):
        return iter(filled(loaded, start, count, tokenizer, options, generator).unbind(1))
    decoding = Decoding(temperature=options.temperature, top_p=options.top_p)
    writer = Writer(loaded.network, loaded.intervals, decoding, generator)
    if loaded.layers is not None:
        return plain_rows(loaded, start, count, writer)
    if isinstance(loaded.network.task, Recurrent):
        return recurrent_rows(writer, start, count)
    return writer.rows(start, count, cache=can_cache(writer, start[:1], report))


def filled(
    loaded: Loaded, start: Tensor, count: int, tokenizer: Tokenizer, options: SampleOptions, generator: torch.Generator
) -> Tensor:
    """The same where tokens are hidden and shown in any order, one evaluation a token: [N, count]."""
    length = start.shape[1] + count
    hidden = (torch.arange(length, device=start.device) >= start.shape[1]).expand(len(start), length)
    found = unmask(
        loaded.network,
        loaded.intervals if loaded.layers is None else loaded.intervals.whole(),
        torch.nn.functional.pad(start, (0, count)),
        hidden,
        steps=count,
        generator=generator,
        temperature=options.temperature,
        vocabulary=tokenizer.size,
        layers=loaded.layers,
    )
    return found[:, start.shape[1] :]
