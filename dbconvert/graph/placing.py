"""Where a vector an example can enter the stream as a token: in the place of the class token, or as one token more.

Shapes: N examples, S positions, d channels; the stream is [N, S, d] with its axes in the network's own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy, Axes
from dbconvert.conditioning.modulation import fit
from dbconvert.graph.inject import eject, inject
from dbconvert.graph.proof import WIDTH
from dbconvert.graph.run import Run
from dbconvert.graph.two_streams import positions_axis
from dbconvert.graph.untouched import no_fast_paths, unchanged_state
from dbconvert.graph.values import item

FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""What networks raise where shapes do not fit."""
REACTS = 1e-6
"""An output that moves by more than this, over the largest, has seen what was changed."""


def with_token(stream: Tensor, vector: Tensor, axes: Axes) -> Tensor:
    """The stream with [N, d] as one position more, the last."""
    return torch.cat([stream, fit(vector, stream, axes)], positions_axis(axes))


def last_everywhere(stream: Tensor, axes: Axes) -> Tensor:
    """[N, S + 1, d] -> the last position at S positions, so that whatever pools them reads that one."""
    place = positions_axis(axes)
    shape = [-1] * stream.dim()
    shape[place] = stream.shape[place] - 1
    return stream.narrow(place, stream.shape[place] - 1, 1).expand(shape)


def without_last(stream: Tensor, axes: Axes) -> Tensor:
    """[N, S + 1, d] -> [N, S, d]."""
    place = positions_axis(axes)
    return stream.narrow(place, 0, stream.shape[place] - 1)


def mean_of_others(stream: Tensor, token: int, axes: Axes) -> Tensor:
    """The mean of all positions but one, at every position."""
    place = positions_axis(axes)
    count = stream.shape[place]
    mean = (stream.sum(place, keepdim=True) - stream.narrow(place, token % count, 1)) / (count - 1)
    return mean.expand_as(stream)


class Placing:
    """Tries a network that it converts; on the way out of `tried` it is as before."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, run: Run) -> None:
        self.model, self.anatomy, self.run = model, anatomy, run
        self.inputs = made_up(anatomy)
        self.examples = len(next(iter(self.inputs.values())))
        generator = torch.Generator().manual_seed(1)
        self.vectors = torch.randn(self.examples, anatomy.width, generator=generator)

    def class_token(self, token: int) -> str | None:
        """The parameter [1, 1, d] that position `token` begins as, and no other; None if there is no such one.

        It can be given one vector an example, which then gets what the stem adds to it, as its position.
        """
        shape = (1, 1, self.anatomy.width)
        for name, parameter in self.model.named_parameters():
            if tuple(parameter.shape) != shape or self.anatomy.layer_of(name) is not None:
                continue
            given = parameter.repeat(self.examples, 1, 1)
            try:
                before = self.entering({name: given})
                given[0] = self.vectors[0]
                after = self.entering({name: given})
            except FAILURES:
                continue
            axes = self.anatomy.axes
            moved = (after != before).any(axes.channel).movedim(axes.batch, 0)
            expected = torch.zeros_like(moved)
            expected[0, token] = True
            if torch.equal(moved, expected) and torch.equal(before, self.entering({})):
                return name
        return None

    def entering(self, instead: Mapping[str, Tensor]) -> Tensor:
        """The stream as it enters the layers, none of which runs."""
        caught: list[Tensor] = []

        def catch(stream: Tensor) -> Tensor:
            caught.append(stream.clone())
            return stream

        self.forward(self.inputs, range(0), catch, None, instead)
        return caught[0]

    def no_room(self, *, read: bool) -> str | None:
        """Why the layers cannot take one token more; None if each of them can.

        Args:
            read: whether the head is to read that token, which then has to see the others; else the others are read,
                which have to see it.
        """
        leave = last_everywhere if read else without_last
        other = {name: changed(value) for name, value in self.inputs.items()}
        for index, layer in enumerate(self.anatomy.layers):
            try:
                found, seen = self.with_one_more(index, leave, other if read else self.inputs, changes=not read)
            except FAILURES as error:
                reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
                return f"{layer.path} fails on one token more: {reason}"
            if not bool(((found - seen).abs() > REACTS * found.abs().max()).flatten(1).any(1).all()):
                return f"in {layer.path} tokens do not see each other"
        return None

    def with_one_more(
        self, index: int, leave: Callable[[Tensor, Axes], Tensor], other: dict[str, Tensor], *, changes: bool
    ) -> tuple[Tensor, Tensor]:
        """Outputs of one layer with one token more, twice: the second time for other inputs, or another token."""
        axes, active = self.anatomy.axes, range(index, index + 1)

        def output(inputs: dict[str, Tensor], vectors: Tensor) -> Tensor:
            return self.forward(
                inputs, active, lambda stream: with_token(stream, vectors, axes), lambda stream: leave(stream, axes)
            )

        return output(self.inputs, self.vectors), output(other, -self.vectors if changes else self.vectors)

    def forward(
        self,
        inputs: dict[str, Tensor],
        active: range,
        entry: Callable[[Tensor], Tensor],
        leave: Callable[[Tensor], Tensor] | None,
        instead: Mapping[str, Tensor] = {},
    ) -> Tensor:
        self.run.reset()
        self.run.active, self.run.entry, self.run.leave = active, entry, leave
        out = torch.func.functional_call(self.model, dict(instead), args=(), kwargs=inputs)
        assert self.anatomy.head is not None
        scores: Tensor = item(out, self.anatomy.head.output)
        return scores


@contextmanager
def tried(model: nn.Module, anatomy: Anatomy) -> Iterator[Placing]:
    """Converts a network for trials and restores it."""
    with unchanged_state(model), no_fast_paths(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.eval()
        run = inject(model, anatomy, blocks=1, width=WIDTH, start="original")
        try:
            yield Placing(model, anatomy, run)
        finally:
            eject(model)


def made_up(anatomy: Anatomy) -> dict[str, Tensor]:
    """Random inputs of the shapes that the analysis saw, of two examples at least."""
    generator = torch.Generator().manual_seed(0)
    rows = 2 if anatomy.embedding is None else anatomy.embedding.rows
    found = {}
    for given in anatomy.inputs:
        shape, kind = (max(2, given.shape[0]), *given.shape[1:]), getattr(torch, given.dtype)
        if kind.is_floating_point:
            found[given.name] = torch.randn(shape, generator=generator).to(kind)
        else:
            found[given.name] = torch.randint(0, rows, shape, generator=generator).to(kind)
    return found


def changed(value: Tensor) -> Tensor:
    """Other inputs of the same kind."""
    return -value if value.is_floating_point() else value.roll(1, -1)
