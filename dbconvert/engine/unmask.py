"""From masks to a text: every step, some hidden tokens are drawn and shown, by the block whose time it is."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dbconvert.data.tokenizers import Tokenizer
from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.sampling import draw_tokens, sigma_grid
from dbconvert.engine.cascade import refuse_gaps
from dbconvert.engine.load import Loaded
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.errors import UsageError
from dbconvert.tasks.masked_lm import MaskedLM


@torch.no_grad()
def unmask(
    network: BlockwiseNetwork,
    intervals: Intervals,
    tokens: Tensor,
    hidden: Tensor,
    *,
    steps: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    layers: range | None = None,
) -> Tensor:
    """Ancestral sampling (MD4, section 4) from t = 1 to 0 in even steps.

    A token hidden at t is shown at s < t with probability (alpha(s) - alpha(t)) / (1 - alpha(t)), drawn from what the
    block of t says; the last step shows all that are left.

    Args:
        tokens: [N, S]; those that are not hidden stay as they are.
        hidden: [N, S] bool.
        steps: network evaluations.
        generator: of the draws, on the CPU.
        temperature: of the draws; 0 takes the likeliest token.
        vocabulary: only tokens below are drawn; all by default.
        layers: for a baseline, the layers that run unconditioned.

    Returns:
        tokens [N, S].
    """
    task = network.task
    if not isinstance(task, MaskedLM):
        raise UsageError(f"task {task.name} hides no tokens", hint="unmasking is for masked_lm")
    if temperature < 0:
        raise UsageError(f"temperature {temperature} is negative")
    argument = task.anatomy.embedding.argument  # type: ignore[union-attr]
    times = [*sigma_grid(intervals.distribution, steps + 1)[:-1], 0.0]
    said: dict[int, Tensor | None] = {}
    if layers is None:
        refuse_gaps(network, intervals, times[:-1])
    for t, earlier in pairwise(times):
        level = torch.full((len(tokens),), t, device=tokens.device)
        if layers is None:
            block = intervals.block_of(t)
            scores = network.denoise(block, {argument: tokens}, hidden, level, heard=said.get(block - 1), tells=True)
            expected = task.expected(network.model, scores) if network.plan.context == "estimate" else None
            said[block] = network.delivered(expected, hidden)
        else:
            scores = network.untold({argument: tokens}, hidden, level, layers)
        drawn = draw_tokens(scores[..., :vocabulary], temperature, generator)
        chance = torch.rand(tokens.shape, generator=generator).to(tokens.device)
        shown = hidden & (chance < task.masking.revealed(t, earlier))
        tokens = torch.where(shown, drawn, tokens)
        hidden = hidden & ~shown
    return tokens


def filled_in(
    loaded: Loaded,
    start: Tensor,
    count: int,
    tokenizer: Tokenizer,
    temperature: float,
    steps: int | None,
    seed: int,
) -> str:
    """The text that follows `start` [1, n] once all that is hidden behind it is shown.

    Args:
        count: at most so many tokens; the example fills up to the length that the network was trained on.

    Raises:
        UsageError: the start leaves no room.
    """
    length = min(start.shape[1] + count, loaded.data.length or start.shape[1] + count)
    if count < 1:
        return ""
    if length <= start.shape[1]:
        raise UsageError(
            f"the prompt has {start.shape[1]} tokens, and the network was trained on {loaded.data.length}",
            hint="shorten the prompt",
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.zeros(1, length, dtype=torch.long)
    tokens[:, : start.shape[1]] = start
    hidden = (torch.arange(length) >= start.shape[1])[None]
    found = unmask(
        loaded.network.to(device),
        loaded.intervals if loaded.layers is None else loaded.intervals.whole(),
        tokens.to(device),
        hidden.to(device),
        steps=steps or int(hidden.sum()),
        generator=torch.Generator().manual_seed(seed),
        temperature=temperature,
        vocabulary=tokenizer.size,
        layers=loaded.layers,
    )
    return tokenizer.decode(found[0, start.shape[1] :].tolist())
