"""Looped cores: where the state is, what says how often they run, and which are refused."""

import networks
import pytest
import torch
from loops import ByArgument, ByModule, Fixed, Halting, InSubmodule, Looped, NormedAfter, Numbered, RandomState
from torch.overrides import _len_torch_function_stack

from dbconvert.anatomy import FunctionCall
from dbconvert.errors import Refused
from dbconvert.graph.analysis import analyse
from dbconvert.graph.functions import Intercepted
from dbconvert.graph.inject import eject, inject
from dbconvert.graph.loop import control
from dbconvert.graph.loop_trial import ask_loop
from dbconvert.graph.looped import LoopPass
from dbconvert.graph.oracle import is_causal
from dbconvert.rounds import Rounds

INPUTS = {"ids": networks.tokens()}


def asked(model):
    model.eval()
    return ask_loop(model, analyse(model, INPUTS))


@pytest.mark.parametrize(
    ("build", "rounds", "place"),
    [
        (Looped, Rounds("", "rounds"), ("", (0, 0), FunctionCall("cat", 0))),
        (RandomState, Rounds("", "rounds"), ("", (0, 0), FunctionCall("cat", 0))),
        (lambda: Looped("add"), Rounds("", "rounds"), ("", (0,), FunctionCall("add", 2))),
        (lambda: Looped("add", layers=1), Rounds("", "rounds"), ("", (0,), FunctionCall("add", 2))),
        (lambda: Looped("none"), Rounds("", "rounds"), None),
        (lambda: Looped("none", layers=1), Rounds("", "rounds"), None),
        (InSubmodule, Rounds("core", "config.loops"), ("core", (0, 0), FunctionCall("cat", 0))),
        (ByModule, Rounds("", "rounds"), ("mixer", (1,), None)),
        (ByArgument, Rounds(None, "steps"), ("", (0, 0), FunctionCall("cat", 0))),
    ],
)
def test_the_state_and_the_count_are_found(build, rounds, place):
    loop = asked(build())
    assert loop.rounds == rounds and loop.prelude == ("tokens", "prelude")
    assert [(p.module, p.argument, p.call) for p in loop.places] == ([] if place is None else [place])
    assert 0.1 < loop.scale < 10


@pytest.mark.parametrize("rounds", [2, 3, 7])
def test_other_counts_are_found_too(rounds):
    """Also where other numbers of the network are the same."""
    model = Looped(rounds=rounds)
    model.aside = model.prelude.turns = rounds
    anatomy = analyse(model.eval(), INPUTS)
    assert anatomy.calls == rounds and ask_loop(model, anatomy).rounds.name == "rounds"


@pytest.mark.parametrize("build", [Looped, lambda: Looped("add"), lambda: Looped("none"), InSubmodule, ByModule])
def test_rounds_one_by_one_are_the_loop(build):
    """K passes of one round each, every one on what the last one left, give the network's own output of K rounds."""
    model = build().eval()
    anatomy = analyse(model, INPUTS)
    loop = ask_loop(model, anatomy)
    with torch.no_grad():
        expected = model(**INPUTS)
        run = inject(model, anatomy, blocks=1, width=8, start="original")
        control(model, anatomy, loop, run)
        state, memory = None, {}
        for _ in range(anatomy.calls):
            run.reset()
            run.keep, run.loop = True, LoopPass(rounds=1, state=state if loop.places else None, memory=memory)
            if state is not None and not loop.places:
                run.entry = lambda _, state=state: state
            found = model(**INPUTS)
            state = run.leaving
    assert torch.allclose(found, expected, atol=1e-5)
    run.reset()
    eject(model)
    with torch.no_grad():
        assert torch.equal(model(**INPUTS), expected)


def test_the_prelude_runs_once():
    model = Looped().eval()
    anatomy = analyse(model, INPUTS)
    loop = ask_loop(model, anatomy)
    run = inject(model, anatomy, blocks=1, width=8, start="original")
    control(model, anatomy, loop, run)
    calls = []
    model.prelude.norm1.register_forward_hook(lambda *_: calls.append(1))
    memory, state = {}, torch.randn(*INPUTS["ids"].shape, networks.WIDTH)
    outputs = []
    with torch.no_grad():
        for kept in (memory, memory, None):
            run.reset()
            run.loop = LoopPass(rounds=1, state=state, memory=kept)
            outputs.append(model(**INPUTS))
    assert len(calls) == 2 and torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_a_random_state_does_not_hide_that_a_network_is_causal():
    model = RandomState().eval()
    assert is_causal(model, analyse(model, INPUTS)) is True
    model = RandomState(causal=False).eval()
    assert is_causal(model, analyse(model, INPUTS)) is False


@pytest.mark.parametrize(
    ("build", "kind", "reason"),
    [
        (Fixed, "looped", "nothing in the network says that its core runs 4 times"),
        (Halting, "control-flow", "depends on the numbers"),
        (Numbered, "looped", "something else changes from round to round"),
        (NormedAfter, "looped", "changed between two rounds"),
    ],
)
def test_refused(build, kind, reason):
    with pytest.raises(Refused, match=reason) as error:
        asked(build())
    assert error.value.kind == kind and error.value.hint


def test_waiting_for_calls_ends_when_all_were_met():
    call, x = FunctionCall("relu", 1), torch.tensor([-1.0, 1.0])
    with Intercepted({}, {}) as outer, Intercepted({call: [torch.neg]}, {}) as waiting:
        torch.relu(x)
        waiting.retire()
        assert torch.relu(x).tolist() == [0, -1] and not waiting.away
        with Intercepted({}, {}):
            waiting.retire()
        assert not waiting.away
        waiting.retire()
        torch.relu(x)
        assert waiting.away and waiting.seen["relu"] == 2
    assert not outer.away and _len_torch_function_stack() == 0
