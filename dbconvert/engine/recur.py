"""Text from a recurrent-depth network: every token from a sampling of the states of all positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dbconvert.engine.infer import ends, sample
from dbconvert.errors import DBConvertError
from dbconvert.tasks.recurrent import Recurrent

if TYPE_CHECKING:
    from dbconvert.engine.generate import Writer


@torch.no_grad()
def recurrent_rows(writer: Writer, start: Tensor, count: int) -> Iterator[Tensor]:
    """At most `count` tokens after each of `start` [N, n], all of the N at once: [N] each time, without a cache.

    All positions follow the sampler's own state, as in evaluation; noise that was drawn for a position stays.
    """
    network, decoding, task = writer.network, writer.decoding, writer.network.task
    assert isinstance(task, Recurrent)
    written, noise = start, torch.zeros(len(start), 0, task.target.width)
    for _ in range(count):
        shape = (len(start), written.shape[1] - noise.shape[1], task.target.width)
        new = torch.randn(shape, generator=writer.generator) if decoding.temperature else torch.zeros(shape)
        noise = torch.cat([noise, new], 1)
        inputs = {task.embedding.argument: written}
        with long_enough(written.shape[1]):
            outputs = sample(
                network, writer.intervals, inputs, steps=decoding.steps, begin=noise, change=writer.filtered
            )
            token = writer.choose(ends(outputs)[1][:, -1])
        yield token
        written = torch.cat([written, token[:, None].to(written.device)], 1)


@contextmanager
def long_enough(tokens: int) -> Iterator[None]:
    """Raises DBConvertError where the network fails on so many tokens."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        raise DBConvertError(
            f"the network fails on {tokens} tokens: {str(error).splitlines()[0]}",
            hint="a network has positions for so many tokens only: shorten the prompt, or ask for fewer tokens",
        ) from error
