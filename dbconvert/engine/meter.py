"""Activations of every run of layers, from as few rehearsals as show them exactly."""

from __future__ import annotations

from dbconvert.engine.rehearsal import Rehearsal


class Meter:
    """Bytes that autograd keeps in an update of some layers; each kind of run is measured once.

    Where all layers are of one kind, and 1, 2, 3 and all of them show to the byte that each adds the same, what lies
    between is computed from these; else every run is measured.

    Args:
        kinds: of the layers: equal numbers are alike.
    """

    def __init__(self, rehearsal: Rehearsal, kinds: tuple[int, ...]) -> None:
        self.rehearsal = rehearsal
        self.kinds = kinds
        self.known: dict[tuple[tuple[int, ...], bool], int] = {}
        alike = len(set(kinds)) == 1 and len(kinds) > 4
        self.additive = alike and all(self.adds_up(checkpointing) for checkpointing in (False, True))

    def adds_up(self, checkpointing: bool) -> bool:
        one, two, three = (self.measured(0, last, checkpointing) for last in range(3))
        more = len(self.kinds) - 1
        return three - two == two - one and self.measured(0, more, checkpointing) == one + more * (two - one)

    def measured(self, first: int, last: int, checkpointing: bool) -> int:
        key = (self.kinds[first : last + 1], checkpointing)
        if key not in self.known:
            self.known[key] = self.rehearsal.kept(range(first, last + 1), checkpointing=checkpointing)
        return self.known[key]

    def kept(self, first: int, last: int, checkpointing: bool) -> int:
        """Of layers `first` to `last`, both included, with stem, readout and loss."""
        if not self.additive:
            return self.measured(first, last, checkpointing)
        one, two = (self.measured(0, end, checkpointing) for end in range(2))
        return one + (last - first) * (two - one)

    def peak(self, first: int, last: int, checkpointing: bool) -> int:
        """With checkpointing a layer is run again for its backward pass: the largest of them counts too."""
        kept = self.kept(first, last, checkpointing)
        return kept + max(self.recomputed(i) for i in range(first, last + 1)) if checkpointing else kept

    def end_to_end(self, checkpointing: bool) -> int:
        """Of the unconditioned network."""
        kept = self.rehearsal.kept(None, checkpointing=checkpointing)
        return kept + max(self.recomputed(i) for i in range(len(self.kinds))) if checkpointing else kept

    def recomputed(self, layer: int) -> int:
        return self.measured(layer, layer, False) - self.measured(layer, layer, True)
