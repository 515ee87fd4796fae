"""Running a core that the network calls again and again: how often, on what state, with gradients through how much.

The network's own forward runs. What says how often the core is called is set for the time of one pass; the state is
put in where the first round takes it; modules before the core may give what they gave in an earlier pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dbconvert.graph.functions import Arguments, Intercepted
from dbconvert.graph.tape import called
from dbconvert.graph.values import look_up, put_in
from dbconvert.rounds import Rounds, StatePlace

Memory = dict[str, list[tuple[Any, Counter[str]]]]
"""By module path, what each of its calls gave, and how many functions of each name it called."""


@dataclass
class LoopPass:
    """What a looped core does in one forward pass.

    Args:
        rounds: how often it runs; None leaves that to the network.
        state: what its first round takes for the state; None leaves the network's own.
        blind: so many rounds, the first ones, run without a graph.
        memory: what the modules before the core gave in an earlier pass; empty, it is filled. None runs them.
        meeting: the calls that are waited for, and counted till then.
        turns: how often each remembered module was called in this pass.
    """

    rounds: int | None = None
    state: Tensor | None = None
    blind: int = 0
    memory: Memory | None = None
    meeting: list[Intercepted] = field(default_factory=list)
    turns: Counter[str] = field(default_factory=Counter)


class RoundsModule(nn.Module):
    """Mixed into the class of the network: tells it how often the core runs."""

    db_run: Any
    db_rounds: Rounds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        loop = self.db_run.loop
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # blind rounds switch it, and may end in an error
            if loop is None or loop.rounds is None:
                return super().forward(*args, **kwargs)
            with told(self, self.db_rounds, loop.rounds) as more:
                return super().forward(*args, **kwargs, **more)


class RoundModule(nn.Module):
    """Mixed into the classes of the core's first and last layer: a round begins and ends here."""

    db_run: Any
    db_begins: bool
    db_ends: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        loop = self.db_run.loop
        if loop is not None and self.db_begins:
            for counted in loop.meeting:
                counted.retire()
        if loop is None or loop.blind == 0:
            return super().__call__(*args, **kwargs)
        if self.db_begins:
            torch.set_grad_enabled(False)
        out = super().__call__(*args, **kwargs)
        if self.db_ends:
            loop.blind -= 1
            torch.set_grad_enabled(loop.blind == 0)
        return out


class StateModule(nn.Module):
    """Mixed into the class of a module in which a round takes the state."""

    db_run: Any
    db_places: tuple[StatePlace, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        loop = self.db_run.loop
        if loop is None or loop.state is None:
            return super().forward(*args, **kwargs)
        give = partial(like, loop.state)
        calls: Arguments = {}
        for place in self.db_places:
            if place.call is not None:
                calls.setdefault(place.call, []).append((place.argument, give))
            else:
                args, kwargs = put_in(args, kwargs, place.argument, give(look_up(args, kwargs, place.argument)))
        if not calls:
            return super().forward(*args, **kwargs)
        with Intercepted({}, calls) as counted:
            loop.meeting.append(counted)
            try:
                return super().forward(*args, **kwargs)
            finally:
                loop.meeting.pop()


class OnceModule(nn.Module):
    """Mixed into the class of a module that runs before the core: it may give what it gave in an earlier pass."""

    db_run: Any
    db_path: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        loop = self.db_run.loop
        if loop is None or loop.memory is None:
            return super().forward(*args, **kwargs)
        kept = loop.memory.setdefault(self.db_path, [])
        turn = loop.turns[self.db_path]
        loop.turns[self.db_path] += 1
        if turn < len(kept):
            out, made = kept[turn]
            for counted in loop.meeting:
                counted.seen.update(made)
            return out
        with Counted() as counted:
            out = super().forward(*args, **kwargs)
        kept.append((out, counted.seen))
        return out


class Counted(TorchFunctionMode):
    """Counts the functions that are called, by name: those that a remembered module would call count all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen[called(func)] += 1
        return func(*args, **(kwargs or {}))


LOOPED = (RoundsModule, RoundModule, StateModule, OnceModule)


def like(state: Tensor, old: Any) -> Tensor:
    """The state in the type of what it takes the place of."""
    return state.to(old.dtype) if isinstance(old, Tensor) else state


@contextmanager
def told(model: nn.Module, rounds: Rounds, count: int) -> Iterator[dict[str, int]]:
    """Sets how often the core runs meanwhile; gives the arguments that the network's forward then needs."""
    if rounds.module is None:
        yield {rounds.name: count}
        return
    holder: Any = model.get_submodule(rounds.module)
    *objects, name = rounds.name.split(".")
    for each in objects:
        holder = getattr(holder, each)
    before = getattr(holder, name)
    setattr(holder, name, count)
    try:
        yield {}
    finally:
        setattr(holder, name, before)
