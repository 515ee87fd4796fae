"""From residual additions to layers: which module repeats along the spine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from dbconvert.errors import Refused
from dbconvert.graph import ops
from dbconvert.graph.spine import ResidualAdd, Spines
from dbconvert.graph.tape import Recording, describe

SLICE = re.compile(r"(?P<path>.*)\[(?P<first>-?\d*):(?P<end>-?\d*)\]")
RIVAL = 1 / 3
"""A second stack with this share of the largest one's work (parameters x calls) makes the choice the user's."""


@dataclass(frozen=True)
class Stack:
    """Layers that follow each other on one spine.

    Args:
        container: path of the module that holds them.
        layers: (module path, its additions in one call), in the order of the stream.
        calls: how often each layer is called.
        left_out: called children of the container that are not part of it.
        work: parameters x calls.
        join: where two streams that the first layers carry become the one of the others; None where they do not.
    """

    container: str
    layers: tuple[tuple[str, tuple[ResidualAdd, ...]], ...]
    calls: int
    left_out: tuple[str, ...]
    work: int
    join: fx.Node | None = None

    def summary(self) -> str:
        looped = f", each called {self.calls} times" if self.calls > 1 else ""
        return f"{self.container or '(the network itself)'}: {len(self.layers)} layers{looped}"


def find_stacks(recording: Recording, spines: Spines) -> list[Stack]:
    """Every stack of at least two layers, or of one layer called again and again; most work first,
    of equals the one that comes first."""
    found: dict[str, Stack] = {}
    for chain in spines.chains():
        for stack in stacks_of_chain(chain, recording, spines):
            best = found.get(stack.container)
            if best is None or len(stack.layers) > len(best.layers):
                found[stack.container] = stack
    place = spines.reach.index
    return sorted(found.values(), key=lambda s: (-s.work, place[s.layers[0][1][0].node]))


def choose_stack(stacks: list[Stack], wanted: str | None, model: nn.Module) -> Stack:
    """The stack to convert.

    Args:
        wanted: `PATH`, or `PATH[a:b]` for some of its layers, as in a Python slice.

    Raises:
        Refused: the wanted path holds no stack, or several stacks are of similar size.
    """
    if wanted is not None:
        return wanted_stack(stacks, wanted, model)
    rivals = [s for s in stacks if s is stacks[0] or (s.work >= RIVAL * stacks[0].work and not within(s, stacks[0]))]
    if len(rivals) > 1:
        raise Refused(
            f"the network has {len(rivals)} stacks of similar size, and only one can be cut",
            node=", ".join(s.container for s in rivals),
            kind="several-stacks",
        )
    return stacks[0]


def within(stack: Stack, other: Stack) -> bool:
    """Whether the other stack holds all layers of this one."""
    return {path for path, _ in stack.layers} <= {path for path, _ in other.layers}


def wanted_stack(stacks: list[Stack], wanted: str, model: nn.Module) -> Stack:
    match = SLICE.fullmatch(wanted)
    path = match["path"] if match else wanted
    found = next((stack for stack in stacks if stack.container == path), None)
    if found is None:
        known = path in dict(model.named_modules())
        listing = "; ".join(stack.summary() for stack in stacks)
        raise Refused(
            f"{path} holds no stack of residual layers" if known else f"the network has no module {path}",
            node=wanted,
            kind="no-stack",
            hint=f"stacks found: {listing}" if listing else "",
        )
    if match is None:
        return found
    bounds = (int(match[name]) if match[name] else None for name in ("first", "end"))
    kept = found.layers[slice(*bounds)]
    if len(kept) < 2:
        raise Refused(
            f"{wanted} keeps {len(kept)} of {len(found.layers)} layers, and a stack needs two",
            node=path,
            kind="no-stack",
        )
    others = tuple(layer for layer, _ in found.layers if layer not in {own for own, _ in kept})
    work = found.work * len(kept) // len(found.layers)
    return Stack(path, kept, found.calls, (*found.left_out, *others), work, found.join)


def stacks_of_chain(chain: list[ResidualAdd], recording: Recording, spines: Spines) -> Iterator[Stack]:
    """The stacks along one chain: for every module that has repeated children on it, its longest unbroken run."""
    votes = [home_votes(add, spines) for add in chain]
    taken: set[int] = set()
    parents = {parent for vote in votes for parent in vote}
    ranked = sorted(parents, key=lambda p: (-sum(p in vote for vote in votes), p.count("."), p))
    for parent in ranked:
        run = longest_run(parent, votes, taken)
        stack = build_stack(parent, [(votes[i][parent], chain[i]) for i in run], recording, spines.model)
        if stack is not None:
            taken.update(run)
            yield stack


def home_votes(add: ResidualAdd, spines: Spines) -> dict[str, str]:
    """{parent: child}: the child of each module that most of the branches' nodes live in.

    A child counts for a parent only if at least half of all the branch's homes lie in it.
    """
    homes = branch_homes(add, spines)
    counts: Counter[tuple[str, str]] = Counter()
    for home in homes:
        parts = home.split(".")
        for k in range(len(parts)):
            counts[".".join(parts[:k]), parts[k]] += 1
    return {parent: child for (parent, child), n in counts.items() if 2 * n > len(homes)}


def branch_homes(add: ResidualAdd, spines: Spines) -> list[str]:
    """Module paths that the branches of an addition run through: of modules and weights, else of scopes."""
    between = spines.reach.between(add.source, add.branches)
    inside = [n for n in between if n not in add.on_spine and ops.unchanged(n) is None] or between
    weights = {node for n in inside for node in n.all_input_nodes if node.op == "get_attr"}
    used = {n for n in inside if n.op == "call_module"} | weights
    targets = [str(node.target) for node in used if not str(node.target).startswith("_constant")]
    return targets or [node.meta["scope"][-1] for node in inside if node.meta.get("scope")]


def longest_run(parent: str, votes: list[dict[str, str]], taken: set[int]) -> list[int]:
    """Indices of the longest unbroken run of additions that live in children of `parent`."""
    runs: list[list[int]] = [[]]
    for i, vote in enumerate(votes):
        if parent in vote and i not in taken:
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return max(runs, key=len)


def build_stack(
    container: str, additions: list[tuple[str, ResidualAdd]], recording: Recording, model: nn.Module
) -> Stack | None:
    """A stack from additions labelled with the child they live in; None if the children do not repeat."""
    paths = [f"{container}.{child}".lstrip(".") for child, _ in additions]
    names = list(dict.fromkeys(paths))
    if not names or not repeats(names, recording, model):
        return None
    calls = max(1, *(len(recording.calls_of(path)) for path in names))  # parts of a layer may be called, and not it
    if len(names) == 1 and calls < 2:
        return None
    layers = []
    for path in names:
        own = [add for p, (_, add) in zip(paths, additions, strict=True) if p == path]
        if calls > 1:  # what a loop adds to its state between two rounds is none of the layer's
            own = [add for add in own if call_of(add, path) is not None] or own
        layers.append((path, tuple(add for add in own if call_of(add, path) == call_of(own[0], path))))
    parameters = sum(p.numel() for path in names for p in model.get_submodule(path).parameters())
    return Stack(container, tuple(layers), calls, left_out(container, names, recording, model), parameters * calls)


def repeats(names: list[str], recording: Recording, model: nn.Module) -> bool:
    """Layers are numbered children, or called children of one class."""
    if len(names) == 1:
        return len(recording.calls_of(names[0])) > 1
    children = [name.rsplit(".", 1)[-1] for name in names]
    classes = {type(model.get_submodule(name)) for name in names}
    called = all(recording.calls_of(name) for name in names)
    return all(child.isdigit() for child in children) or (len(classes) == 1 and called)


def call_of(add: ResidualAdd, path: str) -> int | None:
    """Which call of the module an addition was made in, None if it was made outside of it."""
    scope = add.node.meta["scope"]
    return add.node.meta["calls"][scope.index(path)] if path in scope else None


def left_out(container: str, names: list[str], recording: Recording, model: nn.Module) -> tuple[str, ...]:
    """Numbered siblings that are called but not part of the stack: of a layer's class, or between two layers."""
    prefix = f"{container}." if container else ""
    siblings = [c.path for c in recording.calls if c.path.startswith(prefix) and c.path[len(prefix) :].isdigit()]
    classes = {type(model.get_submodule(name)) for name in names}
    inside = siblings[siblings.index(names[0]) : siblings.index(names[-1])] if set(names) <= set(siblings) else []
    found = [s for s in siblings if s in inside or type(model.get_submodule(s)) in classes]
    return tuple(dict.fromkeys(s for s in found if s not in names))


def refuse_decisions(recording: Recording, paths: tuple[str, ...]) -> None:
    """Refuses a layer whose forward branches on the values of a tensor: the example covers one side only."""
    for node in recording.decisions:
        scope = node.meta.get("scope") or ()
        if any(path in scope for path in paths):
            raise Refused(
                "a layer decides by the values of a tensor what to compute, and the example input covers one side only",
                node=describe(node),
                kind="control-flow",
                hint="replace the `if` by torch.where, or keep that layer out of the stack",
            )
