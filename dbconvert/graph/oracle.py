"""The oracle of [clean ; noisy]: whether one pass shows every noisy token what an ordinary causal pass would.

Masks, positions and states that are a little wrong train without an error. So it is tried: the noisy half's output at
position i must be that of the ordinary network run on the clean tokens before i and the noisy one, for every i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy, Embedding, Layer, Path, SideAxes
from dbconvert.errors import DBConvertError, Refused
from dbconvert.graph.halves import LastLayer
from dbconvert.graph.inject import PREFIX, eject, inject
from dbconvert.graph.run import Run
from dbconvert.graph.tape import argument_leaves
from dbconvert.graph.two_streams import TwoStreams, spread
from dbconvert.graph.untouched import no_fast_paths, unchanged_state
from dbconvert.graph.values import item

WIDTH = 8
EXAMPLES, LENGTHS = 2, (18, 12, 7)
"""Prime to each other with the sizes of heads as far as possible, and longer than a twin's window."""
TOLERANCE = 1e-5
MIXED_OTHERWISE = (
    "positions may only be mixed by attention whose mask is an argument of the layer or of "
    "torch.nn.functional.scaled_dot_product_attention: not by recurrent layers, by convolutions along the sequence, or "
    "by masks made by hand inside a layer"
)


@dataclass
class Trial:
    """A converted network and what it is tried on.

    Args:
        tokens: [N, S]. noisy: what stands for the noisy tokens' embeddings, [N, S, width].
        conditions: of clean and of noisy positions, [N, WIDTH] each.
    """

    model: nn.Module
    anatomy: Anatomy
    run: Run
    tokens: Tensor
    noisy: Tensor
    conditions: tuple[Tensor, Tensor]

    @property
    def embedding(self) -> Embedding:
        assert self.anatomy.embedding is not None
        return self.anatomy.embedding

    def logits(self, tokens: Tensor) -> Tensor:
        head = self.anatomy.head
        assert head is not None
        found: Tensor = item(self.model(**{self.embedding.argument: tokens}), head.output)
        return found

    def prefixed(self, i: int, active: range | None) -> Tensor:
        """The ordinary network's output at position i for the clean tokens before i and the noisy one, [N, V]."""
        noisy = self.noisy[:, i : i + 1]
        clean, last = self.conditions
        self.run.reset()
        self.run.active = active
        self.run.condition = torch.stack([clean] * i + [last], 1)
        self.run.embed = lambda out, _: torch.cat([out[:, :i], noisy], 1)
        return self.logits(self.tokens[:, : i + 1])[:, i]

    def together(self, streams: TwoStreams, active: range | None, *, halves: bool = False) -> Tensor:
        """The noisy half's outputs of one pass on both, [N, S, V]; `halves` runs the last layer on each by itself."""
        self.run.reset()
        self.run.active = active
        self.run.condition = torch.stack(self.conditions, 1)
        self.run.embed = lambda out, _: torch.cat([out[: len(self.noisy)], self.noisy])
        self.run.entry, self.run.leave = streams.enter, streams.leave
        self.run.beside, self.run.attention = streams.beside, streams.attention
        self.run.last = LastLayer(streams) if halves else None
        return self.logits(torch.cat([self.tokens, self.tokens]))

    def difference(self, sides: dict[Path, SideAxes], active: range | None = None) -> float:
        """The largest, over the size of the outputs."""
        length = self.tokens.shape[1]
        streams = TwoStreams(length, self.anatomy.axes, sides)
        expected = torch.stack([self.prefixed(i, active) for i in range(length)], 1)
        found = self.together(streams, active)
        return apart(found, expected)

    def can_halve(self, sides: dict[Path, SideAxes], layer: int) -> bool:
        """Whether a layer that ends a block gives the same when its clean half is run for keys and values only."""
        active = range(layer, layer + 1)
        streams = [TwoStreams(self.tokens.shape[1], self.anatomy.axes, sides) for _ in range(2)]
        expected = self.together(streams[0], active)
        found = attempt(lambda: apart(self.together(streams[1], active, halves=True), expected))
        return isinstance(found, float) and found <= TOLERANCE


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest of the expected values or 1; infinite for numbers that are none."""
    worst = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    return float("inf") if isnan(worst) else worst


def ask(model: nn.Module, anatomy: Anatomy) -> tuple[tuple[SideAxes, ...], bool]:
    """Tries [clean ; noisy] on a network with random conditioning.

    Returns the axes of what the layers receive beside the stream, and whether every layer gives the same when its clean
    half is run for keys and values only.

    Raises:
        Refused: an output differs, or the pass fails; the error names the first layer at fault.
    """
    embedding = anatomy.embedding
    assert embedding is not None
    with no_fast_paths(), torch.no_grad(), torch.random.fork_rng(devices=[]), outspoken(model, anatomy):
        tokens = longest_that_runs(model, embedding)
        sides = side_axes(model, anatomy, embedding, tokens)
        run = inject(model, anatomy, blocks=1, width=WIDTH, start="original")
        for modulation in model.get_submodule(f"{PREFIX}.modulation").parameters():
            modulation.normal_(std=0.1)
        noisy = torch.randn(EXAMPLES, tokens.shape[1], embedding.width)
        noisy *= spread(model.get_submodule(embedding.module), embedding.rows, tokens.device)
        conditions = torch.randn(EXAMPLES, WIDTH), torch.randn(EXAMPLES, WIDTH)
        trial = Trial(model, anatomy, run, tokens, noisy, conditions)
        judge(trial, sides)
        halves = all(trial.can_halve(sides, layer) for layer in range(anatomy.depth))
    return tuple(sides.values()), halves


def is_causal(model: nn.Module, anatomy: Anatomy) -> bool | None:
    """Whether outputs stay as they are when a later token changes; None where there are none of every position."""
    embedding, head = anatomy.embedding, anatomy.head
    if embedding is None or head is None or head.pooled:
        return None
    with no_fast_paths(), torch.no_grad(), torch.random.fork_rng(devices=[]), outspoken(model, anatomy):
        tokens = longest_that_runs(model, embedding)
        changed = tokens.clone()
        changed[:, -1] = (changed[:, -1] + 1) % embedding.rows
        found = []
        for each in (tokens, changed):
            torch.manual_seed(0)  # a looped core may begin with a random state
            found.append(item(run_on(model, embedding, each), head.output))
            if found[-1].shape[1] < tokens.shape[1]:
                raise Refused(
                    f"of {tokens.shape[1]} positions the head reads {found[-1].shape[1]}",
                    node=head.module,
                    kind="head",
                    hint="give it all of them, head(x) in place of head(x[:, [-1]]), whether targets are given or not",
                )
        before, after = (each[:, :-1] for each in found)
    return apart(after, before) <= TOLERANCE


@contextmanager
def outspoken(model: nn.Module, anatomy: Anatomy) -> Iterator[None]:
    """Meanwhile layers speak as loudly as their stream: freshly initialised ones whisper, and so would mistakes.

    Weights that begin at zero, a head's or those at the ends of branches, become random: they would say nothing. A copy
    would not do: functions that a layer keeps (`self.mlpf = lambda x: ..`) go on calling the modules copied from. What
    was injected meanwhile is taken out again; random numbers are seeded.
    """
    torch.manual_seed(0)
    before = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    with unchanged_state(model), torch.no_grad():
        model.eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            if not bool(parameter.any()):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif anatomy.layer_of(name) is not None:
                scale = float(parameter.float().std()) * parameter.shape[-1] ** 0.5
                parameter.mul_(1 / scale if scale else 1)
        try:
            yield
        finally:
            if hasattr(model, PREFIX):
                eject(model)
            for parameter, value in before:
                parameter.copy_(value)


def judge(trial: Trial, sides: dict[Path, SideAxes]) -> None:
    whole = attempt(lambda: trial.difference(sides))
    if isinstance(whole, float) and whole <= TOLERANCE:
        return
    for index, layer in enumerate(trial.anatomy.layers):
        alone = attempt(lambda index=index: trial.difference(sides, range(index, index + 1)))  # type: ignore[misc]
        if not isinstance(alone, float) or alone > TOLERANCE:
            raise unfit(layer, alone)
    raise unfit(None, whole)


def attempt(work: Callable[[], float]) -> float | Exception:
    """What it gives, or the error that it ends in."""
    try:
        return work()
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError, KeyError, DBConvertError) as error:
        return error


def unfit(layer: Layer | None, outcome: float | Exception) -> Refused:
    what = f"differs by {outcome:.1e}" if isinstance(outcome, float) else f"fails: {str(outcome).splitlines()[0]}"
    return Refused(
        f"one pass on clean and noisy tokens together {what}: it does not show every noisy token what its clean prefix "
        "alone would",
        node="" if layer is None else f"{layer.path} ({layer.type})",
        kind="two-streams",
        hint=MIXED_OTHERWISE,
    )


# -- what it is tried on ----------------------------------------------------------------------------------------


def longest_that_runs(model: nn.Module, embedding: Embedding) -> Tensor:
    """Random tokens [N, S] of the greatest trial length that the network takes."""
    error: Exception | None = None
    for length in LENGTHS:
        tokens = torch.randint(0, embedding.rows, (EXAMPLES, length))
        outcome = attempt(lambda tokens=tokens: float(len(run_on(model, embedding, tokens))))  # type: ignore[misc]
        if isinstance(outcome, float):
            return tokens
        error = outcome
    raise Refused(
        f"the network does not run on {LENGTHS[-1]} tokens: {str(error).splitlines()[0]}",
        node=embedding.module,
        kind="two-streams",
        hint="give it positions for more",
    )


def run_on(model: nn.Module, embedding: Embedding, tokens: Tensor) -> Any:
    return model(**{embedding.argument: tokens})


def side_axes(model: nn.Module, anatomy: Anatomy, embedding: Embedding, tokens: Tensor) -> dict[Path, SideAxes]:
    """Which axes of every side input grow with the batch and with the length, by argument.

    Raises:
        Refused: layers differ in what they receive at one argument.
    """
    base = side_shapes(model, anatomy, embedding, tokens)
    larger = side_shapes(model, anatomy, embedding, torch.cat([tokens, tokens[:1]]))
    shorter = side_shapes(model, anatomy, embedding, tokens[:, :-1])
    found: dict[Path, SideAxes] = {}
    for (path, argument), shape in base.items():
        batch = moved(shape, larger.get((path, argument)))
        sequence = moved(shape, shorter.get((path, argument)))
        axes = SideAxes(argument, batch[0] if batch else None, sequence)
        if found.setdefault(argument, axes) != axes:
            raise Refused(
                f"the layers receive tensors of different kinds at {'.'.join(map(str, argument))}",
                node=path,
                kind="two-streams",
                hint="give every layer the same kind of side input",
            )
    return found


def moved(shape: tuple[int, ...], other: tuple[int, ...] | None) -> tuple[int, ...]:
    """The axes along which two shapes differ."""
    return () if other is None else tuple(i for i, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b)


def side_shapes(
    model: nn.Module, anatomy: Anatomy, embedding: Embedding, tokens: Tensor
) -> dict[tuple[str, Path], tuple[int, ...]]:
    """The shapes of all tensors that enter a layer beside the stream, by module path and argument."""
    shapes: dict[tuple[str, Path], tuple[int, ...]] = {}
    hooks = []
    for path, stream in streams_in(anatomy):

        def note(_: nn.Module, args: Any, kwargs: Any, path: str = path, stream: Path = stream) -> None:
            for argument, value in argument_leaves(args, kwargs):
                if isinstance(value, Tensor) and argument != stream:
                    shapes[path, argument] = tuple(value.shape)

        hooks.append(model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
    try:
        run_on(model, embedding, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def streams_in(anatomy: Anatomy) -> list[tuple[str, Path]]:
    """The modules that the stream enters, with the argument that carries it."""
    found: list[tuple[str, Path]] = []
    for layer in anatomy.layers:
        parts = [layer] if layer.around is None else layer.around.parts
        found.extend((part.path, part.stream_in) for part in parts)
    return found
