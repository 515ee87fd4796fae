"""The residual stream, found by dominance.

A sum is a residual addition if and only if exactly one of its terms is an ancestor of every other term: that
term is the stream, the others are branches computed from it. Chains of such sums are residual streams. No
container, class name or call boundary is needed, and nothing is assumed about what a branch does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx, nn

from dbconvert.graph import ops
from dbconvert.graph.pieces import cut_from, joined_along, joined_at, piece
from dbconvert.graph.reach import Reach
from dbconvert.graph.tape import Recording

EXPANSIONS = 4
"""How deep nested sums, a + (b + c), are opened to find the stream among their terms."""


@dataclass(frozen=True)
class ResidualAdd:
    """stream_out = stream_in + sum of branches.

    Args:
        node: the addition.
        source: the node that made the numbers of the stream before it.
        branches: the other terms.
        on_spine: normalisations, activations, scalings and shifts between `source` and this addition, nearest first.
        partial: residual additions on the way, x + f(x) in x + f(x) + g(an earlier x).
        joined: of a stream that lies beside another one while it is added to: the additions to both.
    """

    node: fx.Node
    source: fx.Node
    branches: tuple[fx.Node, ...]
    on_spine: tuple[fx.Node, ...] = ()
    partial: tuple[fx.Node, ...] = ()
    joined: tuple[ResidualAdd, ...] = ()

    @property
    def written(self) -> tuple[ResidualAdd, ...]:
        """The additions as the network writes them."""
        return self.joined or (self,)


@dataclass
class Spines:
    """All residual additions of a recording, and how they chain."""

    model: nn.Module
    reach: Reach
    adds: dict[fx.Node, ResidualAdd] = field(default_factory=dict)
    length: dict[fx.Node, int] = field(default_factory=dict)

    def chain(self, end: fx.Node) -> list[ResidualAdd]:
        """The additions that lead to `end`, first to last."""
        found = []
        while end in self.adds:
            found.append(self.adds[end])
            end = self.adds[end].source
        return found[::-1]

    def chains(self) -> list[list[ResidualAdd]]:
        """Every chain that no other addition continues: those whose end is used before all others, then the longest
        first; of equals the one that ends last."""
        continued = {node for add in self.adds.values() for node in (add.source, *add.partial)}
        ends = [node for node in reversed(self.adds) if node not in continued]
        ends.sort(key=lambda node: (not node.users, -self.length[node]))
        return [self.chain(end) for end in ends]

    def look_through(self, node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """The node that made the stream's numbers, past casts, views and what sits on the spine after an addition."""
        passed: list[fx.Node] = []
        while True:
            node = ops.origin(node)
            before = self.before(node)
            if node in self.adds or before is None or self.after_addition(before) is None:
                return node, tuple(passed)
            passed.append(node)
            node = before

    def after_addition(self, node: fx.Node) -> fx.Node | None:
        """The residual addition whose result `node` still is, past casts and what sits on the spine; else None."""
        while True:
            node = ops.origin(node)
            if node in self.adds:
                return node
            before = self.before(node)
            if before is None:
                return None
            node = before

    def before(self, node: fx.Node) -> fx.Node | None:
        """What a norm, an activation, a scaling or a shift reads: operations that may stand on a stream. None for all
        others."""
        if ops.is_norm(node, self.model) or ops.is_activation(node, self.model):
            return ops.first(node)
        return ops.scaled(node) or ops.shifted(node)


def find_spines(recording: Recording, model: nn.Module) -> Spines:
    spines = Spines(model, Reach(recording.graph))
    for node in spines.reach.nodes:
        adds = ops.is_addition(node) or ops.adds_scaled(node)
        add = residual(node, spines) if adds else beside(node, spines)
        if add is not None:
            spines.adds[node] = add
            spines.length[node] = 1 + spines.length.get(add.source, 0)
    return spines


def residual(node: fx.Node, spines: Spines) -> ResidualAdd | None:
    """`node` as a residual addition, or None if no term, or more than one, dominates the others."""
    terms = ops.operands(node)
    partial: list[fx.Node] = []
    scales = ops.adds_scaled(node)
    for _ in range(EXPANSIONS):
        streams = [(t, t, ()) for t in terms if dominates(t, t, terms, spines)] or scaled_streams(terms, spines)
        if streams:
            break
        if scales:
            return None
        opened = [part for t in terms for part in open_sum(t, spines)]
        if len(opened) == len(terms):
            return None
        partial += [ops.origin(t) for t in terms if ops.origin(t) in spines.adds]
        terms = opened
    if len(streams) != 1:
        return None
    term, stream, scaling = streams[0]
    if scales and term is not terms[0]:
        return None
    source, passed = spines.look_through(stream)
    branches = [part for t in terms if t is not term for part in all_terms(t, node, source, spines)]
    if ops.size(source) != ops.size(node) or any(ops.size(b) != ops.size(node) for b in branches):
        return None
    return ResidualAdd(node, source, tuple(branches), (*scaling, *passed), tuple(partial))


def beside(node: fx.Node, spines: Spines) -> ResidualAdd | None:
    """A slice as an addition to a stream, x' of x', y' = split([x, y] + f([x, y])) in one forward; else None."""
    whole = cut_from(node)
    end, passed = (node, ()) if whole is None else spines.look_through(whole)
    joined = spines.chain(end)
    made = [joined[0].source, *(add.node for add in joined)] if joined else []
    if passed or not made or any(n.meta["calls"] != node.meta["calls"] for n in made):
        return None
    cut = piece(node) if joined_along(made[0]) is not None else None
    before = None if cut is None else joined_at(made[0], cut)
    if before is None:
        return None
    source, passed = spines.look_through(before)
    joined[0] = replace(joined[0], on_spine=(*passed, *joined[0].on_spine))
    on_spine = tuple(n for add in joined for n in add.on_spine)
    branches = tuple(branch for add in joined for branch in add.branches)
    return ResidualAdd(node, source, branches, on_spine, joined=tuple(joined))


def scaled_streams(terms: list[fx.Node], spines: Spines) -> list[tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]]:
    """Terms a * h + b where h dominates all others, as in a * h + b + f(h): (term, h, scalings and shifts)."""
    found = []
    for term in terms:
        passed: list[fx.Node] = []
        before: fx.Node | None = term
        while before is not None and not (passed and dominates(before, term, terms, spines)):
            passed.append(ops.origin(before))
            before = ops.scaled(passed[-1]) or ops.shifted(passed[-1])
        if before is not None:
            found.append((term, before, tuple(passed)))
    return found


def dominates(stream: fx.Node, own: fx.Node, terms: list[fx.Node], spines: Spines) -> bool:
    """Whether all terms but its `own` are computed from `stream`: from what stands on the spine last."""
    made = ops.origin(stream)
    return all(t is own or spines.reach.is_ancestor(made, t) for t in terms)


def open_sum(term: fx.Node, spines: Spines) -> list[fx.Node]:
    inner = ops.origin(term)
    return ops.operands(inner) if ops.is_addition(inner) else [term]


def all_terms(term: fx.Node, add: fx.Node, source: fx.Node, spines: Spines) -> list[fx.Node]:
    """A branch that is itself a plain sum in the same forward, attn + mlp, taken apart; a residual sum stays whole,
    and so does one with a part that does not depend on the stream, such as a bias."""
    if not ops.is_addition(term) or term in spines.adds or term.meta["calls"] != add.meta["calls"]:
        return [term]
    parts = ops.operands(term)
    if not all(spines.reach.is_ancestor(source, part) for part in parts):
        return [term]
    return [part for operand in parts for part in all_terms(operand, add, source, spines)]
