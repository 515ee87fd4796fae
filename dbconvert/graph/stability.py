"""Whether the function calls at a network's sites are the same ones whatever it is given, and in train mode."""

from __future__ import annotations

from collections.abc import Iterator

from dbconvert.anatomy import Anatomy, FunctionCall
from dbconvert.graph.tape import Recording, called

Place = tuple[str, FunctionCall]
"""The path of a module and a function call in it."""


def function_sites(anatomy: Anatomy) -> Iterator[Place]:
    for layer in anatomy.layers:
        for branch in layer.branches:
            calls = [branch.norm.call, *(use.call for use in branch.norm.uses)]
            yield from ((f"{layer.path}.{branch.norm.module}".rstrip("."), call) for call in calls if call is not None)
            if branch.gate.call is not None:
                yield f"{layer.path}.{branch.gate.module}".rstrip("."), branch.gate.call


def moved(anatomy: Anatomy, before: Recording, after: Recording) -> list[str]:
    """The sites at which another recording makes another call: of another line of code, or none."""
    lines, others = source_lines(before), source_lines(after)
    places = [place for place in function_sites(anatomy) if lines.get(place) != others.get(place)]
    return [f"{call.name} {call.nth} in {path}" for path, call in places]


def source_lines(recording: Recording) -> dict[Place, str]:
    """Where in the code each function call was made, by module and by how many calls of its name came before.

    Of a module that runs several times, the first time counts.
    """
    found: dict[Place, str] = {}
    for node in recording.graph.nodes:
        for path, nth in zip(node.meta.get("scope", ()), node.meta.get("nth", ()), strict=False):
            found.setdefault((path, FunctionCall(called(node.target), nth)), node.meta["line"])
    return found
