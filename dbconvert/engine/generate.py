"""generate: text from a trained network, one token at a time, every token denoised by all blocks in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from dbconvert.data.tokenizers import Tokenizer
from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.sampling import euler_step, levels
from dbconvert.engine.cascade import refuse_gaps
from dbconvert.engine.listening import newest
from dbconvert.engine.load import Loaded, load
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.recur import long_enough, recurrent_rows
from dbconvert.engine.unmask import filled_in
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Note, Reporter, Stage, silent
from dbconvert.graph.prefix import Prefix
from dbconvert.schema import Count, Positive, record
from dbconvert.tasks.causal_lm import CausalLM, Level
from dbconvert.tasks.masked_lm import MaskedLM
from dbconvert.tasks.recurrent import Recurrent

AGREE = 1e-3
"""The largest difference of cached and uncached scores, over the largest score."""

SHOWN = 10
"""Unknown characters that a warning names at the most."""


@record
class Decoding:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the likeliest token, from z = 0; else a draw of noise decides, and scores of block 0 are
            divided by it: near sigma_min the choice has been made. Where tokens are hidden it divides all scores.
        top_k, top_p: what block 0's distribution is cut to; 0 and 1 leave it whole.
        steps: network evaluations a token, B + 1 by default; where tokens are hidden, of all together, one a token by
            default.
    """

    temperature: float = 0.0
    top_k: Count = 0
    top_p: float = 1.0
    steps: Positive | None = None


def generate(
    target: str,
    prompt: str,
    *,
    tokens: int = 200,
    decoding: Decoding = Decoding(),  # noqa: B008
    cache: bool = True,
    seed: int = 0,
    model: str | None = None,
    report: Reporter = silent,
) -> Iterator[str]:
    """Continues a prompt; yields text as it comes, or at once where tokens are hidden and shown in any order.

    The first token is made before anything is yielded, so that a prompt that the network does not take is refused here.

    Args:
        target: a checkpoint or a run, as `load` takes it.
        tokens: at most so many; an end token ends it.
        cache: keep keys and values of what is there already.
        model: the network's Python file, where it does not lie beside the checkpoint.

    Raises:
        UsageError: the prompt is empty or too long, or the network is none of text.
        DBConvertError: the network fails, or does so later, as on more tokens than it has positions for.
    """
    if decoding.temperature < 0 or not 0 < decoding.top_p <= 1:
        raise UsageError("temperature must not be negative, and top-p lies in (0, 1]")
    if tokens < 0:
        raise UsageError(f"{tokens} tokens cannot be written", hint="give at least 0 with --tokens")
    report(Stage("loading"))
    loaded = load(target, model)
    tokenizer, task = loaded.tokenizer, loaded.network.decided_task
    if tokenizer is None or not isinstance(task, (CausalLM, MaskedLM, Recurrent)):
        raise UsageError(f"{target} does not generate text", hint="its task is none of causal_lm, masked_lm, recurrent")
    warn_of_strangers(tokenizer.unknown(prompt), report)
    start = torch.tensor([tokenizer.encode(prompt)], dtype=torch.long)
    if isinstance(task, MaskedLM):
        refuse_cuts(decoding)
        return iter([filled_in(loaded, start, tokens, tokenizer, decoding.temperature, decoding.steps, seed)])
    if start.shape[1] == 0:
        raise UsageError("the prompt is empty", hint="give at least one token with --prompt")
    refuse_long(start.shape[1], loaded.longest)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.network.to(device)
    writer = Writer(loaded.network, loaded.intervals, decoding, torch.Generator().manual_seed(seed))
    with taking(start.shape[1], loaded.data.length):
        found = writing(loaded, writer, start.to(device), tokens, cache, report)
        first = list(islice(found, 1))
    return pieces(counted(chain(first, found)), tokenizer, prompt)


def writing(loaded: Loaded, writer: Writer, start: Tensor, count: int, cache: bool, report: Reporter) -> Iterator[int]:
    """At most `count` tokens after `start` [1, n], as the network writes them."""
    if loaded.layers is not None:
        rows = plain_rows(loaded, start, count, writer)
    elif isinstance(loaded.network.task, Recurrent):
        rows = recurrent_rows(writer, start, count)
    else:
        return writer.tokens(start, count, cache=cache and can_cache(writer, start, report))
    return (int(token) for token in rows)


@contextmanager
def taking(prompt: int, trained: int | None) -> Iterator[None]:
    """Raises UsageError where a network fails on a prompt of so many tokens that is no shorter than what it was
    trained on."""
    try:
        yield
    except DBConvertError as error:
        if trained is not None and prompt < trained:
            raise
        known = "" if trained is None else f"; it was trained on {trained}"
        raise UsageError(
            f"the network does not take the prompt of {prompt} tokens",
            why=error.message,
            hint=f"a network may have positions for so many tokens only{known}: shorten the prompt",
        ) from error


def counted(found: Iterator[int]) -> Iterator[int]:
    """The same tokens; a failure says how many there were."""
    count = 0
    try:
        for token in found:
            yield token
            count += 1
    except DBConvertError as error:
        raise DBConvertError(
            error.message,
            where=f"after {count} tokens were written",
            why=error.why,
            hint=f"a network may have positions for so many tokens only: give --tokens {count}, or a shorter prompt",
        ) from error


def refuse_long(prompt: int, longest: int | None) -> None:
    """Rotary positions go on without an error, into what was never trained."""
    if longest is not None and prompt >= longest:
        raise UsageError(
            f"the prompt has {prompt} tokens, and the network has positions for {longest}", hint="shorten the prompt"
        )


def warn_of_strangers(characters: list[str], report: Reporter) -> None:
    """As in validation text, where they count as the same token."""
    if characters:
        some = ", ".join(map(repr, characters[:SHOWN])) + (", ..." if len(characters) > SHOWN else "")
        told = f"characters that the training text did not have: {some}; all become one token, which was not trained on"
        report(Note(told, warning=True))


def refuse_cuts(decoding: Decoding) -> None:
    if decoding.top_k or decoding.top_p < 1:
        raise UsageError("top-k and top-p are for networks that write one token at a time", hint="use --temperature")


def pieces(found: Iterator[int], tokenizer: Tokenizer, prompt: str) -> Iterator[str]:
    """Tokens as text, held back while a character is incomplete."""
    so_far: list[int] = []
    shown = ""
    for token in found:
        if token == tokenizer.eos:
            break
        so_far.append(token)
        text = tokenizer.decode(so_far)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(so_far)[len(shown) :]


@dataclass
class Writer:
    """Writes on, token by token.

    Args:
        generator: of the noise and the draws, on the CPU.
        told: what blocks are told, by block, level and number of texts.
    """

    network: BlockwiseNetwork
    intervals: Intervals
    decoding: Decoding
    generator: torch.Generator
    told: dict[tuple[int, float, int], Level] = field(default_factory=dict)

    @property
    def task(self) -> CausalLM:
        assert isinstance(self.network.task, CausalLM)
        return self.network.task

    @cached_property
    def targets(self) -> Tensor:
        """The columns of the target table, each in one piece, [d, K]: a product with one row reads these fastest."""
        return self.task.table(self.network.model).t().contiguous()

    @cached_property
    def grid(self) -> list[float]:
        """The levels of a token's evaluations.

        Raises:
            UsageError: they pass over a block that the next one wants to hear.
        """
        found = levels(self.intervals, self.decoding.steps)
        refuse_gaps(self.network, self.intervals, found)
        return found

    def tokens(self, start: Tensor, count: int, *, cache: bool) -> Iterator[int]:
        """At most `count` tokens after `start` [1, n]."""
        return (int(token) for token in self.rows(start, count, cache=cache))

    @torch.no_grad()
    def rows(self, start: Tensor, count: int, *, cache: bool) -> Iterator[Tensor]:
        """At most `count` tokens after each of `start` [N, n], all of the N at once: [N] each time."""
        written = start
        prefixes = {b: self.task.prefix() for b in self.network.present} if cache else {}
        for _ in range(count):
            token = self.choose(self.next_scores(written, prefixes))
            yield token
            written = torch.cat([written, token[:, None].to(written.device)], 1)

    def next_scores(self, written: Tensor, prefixes: dict[int, Prefix]) -> Tensor:
        """Scores [N, K] of the token after `written` [N, n], from the last of all levels."""
        grid = self.grid
        z = torch.zeros(len(written), 1, self.task.target.width)
        if self.decoding.temperature:
            z = torch.randn(z.shape, generator=self.generator) * grid[0]
        z = z.to(written.device)
        scores = z
        said: dict[int, Tensor] = {}
        for i, sigma in enumerate(grid):
            block = self.intervals.block_of(sigma)
            scores = self.evaluate(block, written, z, sigma, prefixes.get(block), said.get(block - 1))
            if block == 0:
                scores = self.filtered(scores)
            if i + 1 < len(grid):
                expected = F.linear(scores.float().softmax(-1), self.targets)
                now = self.network.delivered(expected, z)
                if now is not None:
                    said[block] = newest(said.get(block), now, self.task.anatomy.axes)
                z = euler_step(z, expected, sigma, grid[i + 1])
        return scores[:, 0]

    def evaluate(
        self,
        block: int,
        written: Tensor,
        z: Tensor,
        sigma: float,
        prefix: Prefix | None,
        heard: Tensor | None = None,
    ) -> Tensor:
        """One evaluation: scores [N, 1, K]."""
        argument = self.task.anatomy.embedding.argument  # type: ignore[union-attr]
        inputs = {argument: torch.cat([written, written[:, -1:]], 1)}
        passage = self.task.next_passage(inputs, z, self.level(block, z, sigma), prefix)
        with long_enough(written.shape[1] + 1):
            scores = self.network.pass_through(block, passage, heard=heard, tells=True)
        if prefix is not None:
            prefix.end()
        return scores

    def level(self, block: int, z: Tensor, sigma: float) -> Level:
        """What a block is told at one level, made once."""
        key = block, sigma, len(z)
        if key not in self.told:
            corruption = self.network.corrupted(block, z, torch.full((len(z),), sigma, device=z.device))
            self.told[key] = self.task.level(self.network.model, block, corruption)
        return self.told[key]

    def filtered(self, scores: Tensor) -> Tensor:
        """Block 0's scores by temperature, top-k and top-p."""
        decoding = self.decoding
        if not decoding.temperature:
            return scores
        scores = scores.float() / decoding.temperature
        if decoding.top_k:
            least = scores.topk(min(decoding.top_k, scores.shape[-1])).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if decoding.top_p < 1:
            ordered, order = scores.softmax(-1).sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= decoding.top_p
            scores = scores.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
        return scores

    def choose(self, scores: Tensor) -> Tensor:
        """A token for each of [N, K], [N] on the CPU."""
        if not self.decoding.temperature:
            return scores.argmax(-1).cpu()
        return torch.multinomial(scores.float().softmax(-1).cpu(), 1, generator=self.generator)[:, 0]


def can_cache(writer: Writer, start: Tensor, report: Reporter) -> bool:
    """Whether cached scores are those without a cache, tried on the prompt; a note says why not.

    Raises:
        DBConvertError: the network fails on the prompt without a cache too.
    """
    tried = Writer(writer.network, writer.intervals, Decoding(), torch.Generator())
    prefixes = {b: tried.task.prefix() for b in tried.network.present}
    with torch.no_grad():
        plain = tried.next_scores(start, {})
    try:
        with torch.no_grad():
            for length in dict.fromkeys((max(1, start.shape[1] - 1), start.shape[1])):
                cached = tried.next_scores(start[:, :length], prefixes)
    except (DBConvertError, RuntimeError) as error:
        report(Note(f"without a cache: {str(error).splitlines()[0]}", warning=True))
        return False
    apart = float((cached - plain).abs().max() / plain.abs().max().clamp(min=1))
    if apart > AGREE:
        report(Note(f"without a cache: cached scores differ by {apart:.1e}", warning=True))
    return apart <= AGREE


@torch.no_grad()
def plain_rows(loaded: Loaded, start: Tensor, count: int, writer: Writer) -> Iterator[Tensor]:
    """A baseline writes as an ordinary network does, without a cache."""
    written = start
    argument = loaded.network.plan.anatomy.embedding.argument  # type: ignore[union-attr]
    for _ in range(count):
        with long_enough(written.shape[1]):
            output = loaded.network.output(loaded.network.model_output({argument: written}, loaded.layers))
        token = writer.choose(writer.filtered(output[:, -1]))
        yield token
        written = torch.cat([written, token[:, None].to(written.device)], 1)
