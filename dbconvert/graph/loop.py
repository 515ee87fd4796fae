"""Where a looped core takes its state: the recorded first round is compared with the second.

What the second round takes from the end of the first is the state; in the first round the network's initial state
stands in its place.
"""

from __future__ import annotations

from itertools import zip_longest

from torch import fx, nn

from dbconvert.anatomy import Anatomy, FunctionCall, Path
from dbconvert.errors import Refused
from dbconvert.graph.inject import swap_class
from dbconvert.graph.looped import OnceModule, RoundModule, RoundsModule, StateModule
from dbconvert.graph.reach import Reach
from dbconvert.graph.run import Run
from dbconvert.graph.tape import ModuleCall, Recording, argument_leaves, called, describe
from dbconvert.rounds import Loop, StatePlace

Use = tuple[fx.Node, Path]
"""A node and the path of one of its arguments."""
SIMPLE = (
    "one round has to be `state = core(state, what the prelude made)`: begin with a tensor of the state's shape, and "
    "take it up in the same way in every round"
)


def find_state(recording: Recording, model: nn.Module, anatomy: Anatomy) -> tuple[tuple[StatePlace, ...], list[str]]:
    """The places where a round takes the state, none where it enters the first layer as it is, and the modules that
    run once before.

    Raises:
        Refused: the layers are not called in rounds, or the state cannot be found.
    """
    calls = rounds_of(recording, anatomy)
    reach = Reach(recording.graph)
    first, second = (dict(one[0].inputs)[anatomy.layers[0].stream_in] for one in calls[:2])
    end = dict(calls[0][-1].outputs)[anatomy.layers[-1].stream_out]
    refuse_decisions(recording, reach, end)
    uses = state_uses(first, second, end, reach)
    places = tuple(place(*use, recording, calls) for use in uses) if second is not end else ()
    return places, before_the_core(recording, model, calls[0])


def rounds_of(recording: Recording, anatomy: Anatomy) -> list[list[ModuleCall]]:
    """The calls of the layers, round by round."""
    paths = anatomy.layer_paths()
    calls = [call for call in recording.calls if call.path in paths]
    rounds = [calls[i : i + len(paths)] for i in range(0, len(calls), len(paths))]
    if any(layer.around is not None for layer in anatomy.layers) or len(rounds) < 2:
        raise unfit("its layers are not modules that are called", anatomy.stack)
    for one in rounds:
        if tuple(call.path for call in one) != paths:
            raise unfit("its layers are not called in rounds, one after the other", one[0].path)
    return rounds


def refuse_decisions(recording: Recording, reach: Reach, end: fx.Node) -> None:
    for node in recording.decisions:
        if reach.is_ancestor(end, node):
            raise Refused(
                "how the network goes on depends on the numbers that its core computes",
                node=describe(node),
                kind="control-flow",
                hint="call the core a set number of times",
            )


def state_uses(first: fx.Node, second: fx.Node, end: fx.Node, reach: Reach) -> list[Use]:
    """Where the first round takes what the second one takes from `end`, by going back from what enters the core."""
    found: list[Use] = []
    seen: set[tuple[fx.Node, fx.Node]] = set()

    def compare(one: object, other: object, user: fx.Node | None, path: Path) -> None:
        if other is end:
            if user is not None:
                found.append((user, path))
            return
        if one is other or not isinstance(other, fx.Node) or not reach.is_ancestor(end, other):
            return
        if not isinstance(one, fx.Node) or (one.op, one.target) != (other.op, other.target):
            raise unfit("the state is changed between two rounds, or the first round takes another way", other)
        if (one, other) in seen:
            return
        seen.add((one, other))
        pairs = zip_longest(argument_leaves(one.args, one.kwargs), argument_leaves(other.args, other.kwargs))
        for left, right in pairs:
            if left is None or right is None or left[0] != right[0]:
                raise unfit("two rounds call a function with different arguments", other)
            compare(left[1], right[1], one, left[0])

    compare(first, second, None, ())
    if not found and second is not end:
        raise unfit("the second round takes nothing from the first one", second)
    return found


def place(user: fx.Node, argument: Path, recording: Recording, rounds: list[list[ModuleCall]]) -> StatePlace:
    """A use of the state, as a pass with one round can find it again."""
    if user.op == "call_module":
        if len(recording.calls_of(str(user.target))) != len(rounds):
            raise unfit("the module that takes the state is also called elsewhere", user)
        return StatePlace(str(user.target), argument)
    scope, nth = user.meta["scope"], user.meta.get("nth")
    if nth is None or user.op != "call_function":
        raise unfit("the state is taken in a way that cannot be met", user)
    inside = all(scope[-1] in call.scope for one in rounds for call in one)
    if len(recording.calls_of(scope[-1])) != len(rounds) and not (inside and len(recording.calls_of(scope[-1])) == 1):
        raise unfit("the module that takes the state is also called elsewhere", user)
    return StatePlace(scope[-1], argument, FunctionCall(called(user.target), nth[-1]))  # type: ignore[arg-type]


def before_the_core(recording: Recording, model: nn.Module, first: list[ModuleCall]) -> list[str]:
    """Modules with weights that only run before the core, the outermost ones."""
    begin, around = first[0].order, set(first[0].parents)
    found: dict[str, None] = {}
    for call in recording.calls[:begin]:
        outermost = call.order not in around and set(call.parents) <= around
        last = max(other.order for other in recording.calls_of(call.path))
        if outermost and last < begin and any(True for _ in model.get_submodule(call.path).parameters()):
            found[call.path] = None
    return list(found)


def unfit(reason: str, node: fx.Node | str) -> Refused:
    where = node if isinstance(node, str) else describe(node)
    return Refused(f"the state of the looped core cannot be found: {reason}", node=where, kind="looped", hint=SIMPLE)


def control(model: nn.Module, anatomy: Anatomy, loop: Loop, run: Run) -> None:
    """Puts the looped core of a converted network under the control of `run.loop`."""
    for index in dict.fromkeys((0, anatomy.depth - 1)):
        layer = model.get_submodule(anatomy.layers[index].path)
        swap_class(layer, RoundModule)
        layer.__dict__.update(db_begins=index == 0, db_ends=index == anatomy.depth - 1)
    for path in dict.fromkeys(place.module for place in loop.places):
        module = model.get_submodule(path)
        swap_class(module, StateModule)
        own = tuple(place for place in loop.places if place.module == path)
        module.__dict__.update(db_run=run, db_places=own)
    for path in loop.prelude:
        module = model.get_submodule(path)
        swap_class(module, OnceModule)
        module.__dict__.update(db_run=run, db_path=path)
    swap_class(model, RoundsModule)
    model.__dict__.update(db_run=run, db_rounds=loop.rounds)
