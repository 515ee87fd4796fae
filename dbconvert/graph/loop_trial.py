"""Whether a looped core can be run once, on a state that is put in: found by comparing rounds, and tried.

What says how often the core runs is found by setting numbers; that the state is all that a round hands to the next is
proved by one round on the state after the first, which must give what two rounds give.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy
from dbconvert.errors import Refused
from dbconvert.graph.inject import PREFIX, inject
from dbconvert.graph.loop import SIMPLE, control, find_state, unfit
from dbconvert.graph.looped import LoopPass, told
from dbconvert.graph.oracle import EXAMPLES, TOLERANCE, WIDTH, apart, attempt, longest_that_runs, outspoken
from dbconvert.graph.run import Run
from dbconvert.graph.stability import source_lines
from dbconvert.graph.tape import record
from dbconvert.graph.untouched import no_fast_paths, unchanged_state
from dbconvert.graph.values import item
from dbconvert.rounds import Loop, Rounds

Tokens = dict[str, Tensor]


def ask_loop(model: nn.Module, anatomy: Anatomy) -> Loop:
    """How a looped core is run once; tried on a network with random conditioning.

    Raises:
        Refused: what says how often it runs, or the state, is not found; or the state is not all that it carries.
    """
    assert anatomy.embedding is not None
    with unchanged_state(model), no_fast_paths(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.eval()
        tokens = {anatomy.embedding.argument: longest_that_runs(model, anatomy.embedding)}
        rounds = find_rounds(model, anatomy, tokens)
        with told(model, rounds, 2) as more:
            places, prelude = find_state(record(model, (), {**tokens, **more}), model, anatomy)
        loop = Loop(rounds, places, tuple(prelude), scale_of_state(model, anatomy, rounds, tokens))
        refuse_moved(model, loop, tokens)
        with outspoken(model, anatomy):
            Trial.of(model, anatomy, loop, tokens).judge()
    return loop


# -- how often ----------------------------------------------------------------------------------------------------


def find_rounds(model: nn.Module, anatomy: Anatomy, tokens: Tokens) -> Rounds:
    """The number that says how often the core runs: set to 1, 2 or 3, every layer runs so often, in train mode too."""
    for candidate in dict.fromkeys(candidates(model, anatomy.calls)):
        tried = ((1, False), (1, True), (2, False), (3, False))
        if all(calls_at(model, anatomy, candidate, tokens, *at) == at[0] for at in tried):
            return candidate
    raise Refused(
        f"nothing in the network says that its core runs {anatomy.calls} times",
        node=anatomy.stack,
        kind="looped",
        hint="give the network an attribute, or its forward an argument with a default, that says how often the core "
        "is called, and read it in every forward pass",
    )


def candidates(model: nn.Module, count: int) -> Iterator[Rounds]:
    """Everything of that value: arguments of the forward by default, attributes, numbers in objects that are such."""
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if is_count(parameter.default, count):
            yield Rounds(None, name)
    for path, module in model.named_modules():
        yield from (Rounds(path, name) for name, value in vars(module).items() if is_count(value, count))
        for name, value in vars(module).items():
            if name.startswith("_") or not hasattr(value, "__dict__") or isinstance(value, nn.Module | Tensor | type):
                continue
            inner = (key for key, number in vars(value).items() if is_count(number, count))
            yield from (Rounds(path, f"{name}.{key}") for key in inner)


def is_count(value: Any, count: int) -> bool:
    return type(value) is int and value == count


def calls_at(
    model: nn.Module, anatomy: Anatomy, rounds: Rounds, tokens: Tokens, count: int, training: bool
) -> int | None:
    """How often every layer is called when a number is set so; None if they differ, or the network fails."""
    calls = dict.fromkeys(anatomy.layer_paths(), 0)

    def counter(path: str) -> Any:
        def note(*_: object) -> None:
            calls[path] += 1

        return note

    hooks = [model.get_submodule(path).register_forward_pre_hook(counter(path)) for path in calls]

    def run() -> float:
        with unchanged_state(model), told(model, rounds, count) as more:
            model.train(training)
            model(**tokens, **more)
        return 0.0

    try:
        outcome = attempt(run)
    except AttributeError:  # an object whose numbers cannot be set
        return None
    finally:
        for hook in hooks:
            hook.remove()
    found = set(calls.values())
    return found.pop() if outcome == 0.0 and len(found) == 1 else None


def scale_of_state(model: nn.Module, anatomy: Anatomy, rounds: Rounds, tokens: Tokens) -> float:
    """The root mean square of what leaves the core after one round."""
    layer, found = anatomy.layers[-1], []

    def note(_: nn.Module, args: object, out: Any) -> None:
        found.append(float(item(out, layer.stream_out).float().square().mean().sqrt()))

    hook = model.get_submodule(layer.path).register_forward_hook(note)
    try:
        with told(model, rounds, 1) as more:
            model(**tokens, **more)
    finally:
        hook.remove()
    return found[0]


def refuse_moved(model: nn.Module, loop: Loop, tokens: Tokens) -> None:
    """The function calls that take the state must be the same ones in train mode, and with one round."""
    lines: list[dict[Any, str]] = []
    for training in (False, True):
        with unchanged_state(model), told(model, loop.rounds, 1) as more:
            model.train(training)
            lines.append(source_lines(record(model, (), {**tokens, **more})))
    for place in loop.places:
        key = place.module, place.call
        if place.call is not None and lines[0].get(key) != lines[1].get(key):
            raise unfit("train mode takes another way to it", place.module)


# -- the trial ----------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """A network whose looped core is under control, and what it is tried on."""

    model: nn.Module
    anatomy: Anatomy
    loop: Loop
    run: Run
    tokens: Tokens
    condition: Tensor

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy, loop: Loop, tokens: Tokens) -> Trial:
        run = inject(model, anatomy, blocks=1, width=WIDTH, start="original")
        control(model, anatomy, loop, run)
        for modulation in model.get_submodule(f"{PREFIX}.modulation").parameters():
            modulation.normal_(std=0.1)
        return cls(model, anatomy, loop, run, tokens, torch.randn(EXAMPLES, WIDTH))

    def scores(self, rounds: int, state: Tensor | None = None, tokens: Tokens | None = None) -> Tensor:
        """The network's output after so many rounds, from a given state, [N, S, V]; `run.leaving` is the last one."""
        run = self.run
        run.reset()
        run.condition, run.keep = self.condition, True
        run.loop = LoopPass(rounds=rounds, state=state)
        if state is not None and not self.loop.places:
            run.entry = lambda _: state
        torch.manual_seed(0)
        assert self.anatomy.head is not None
        found: Tensor = item(self.model(**(tokens or self.tokens)), self.anatomy.head.output)
        return found

    def judge(self) -> None:
        """Raises Refused where one round on the state after the first is not the second round."""
        twice = self.scores(2)
        self.scores(1)
        state = self.run.leaving
        assert state is not None
        difference = apart(self.scores(1, state), twice)
        self.run.reset()
        if difference > TOLERANCE:
            raise Refused(
                f"one round on the state that the first one left differs from two rounds by {difference:.1e}: "
                "something else changes from round to round",
                node=self.anatomy.stack,
                kind="looped",
                hint=SIMPLE,
            )
