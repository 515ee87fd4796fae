"""Activations of every run of layers, from as few rehearsals as show them exactly."""

from __future__ import annotations

from dbconvert.engine.rehearsal import Rehearsal


class Meter:
    """Bytes that autograd keeps in an update of some layers; each kind of run is measured once.

    Where single layers, neighbours of every two kinds, the first three layers and the whole stack show to the byte
    that each kind adds its own to what every run shares (stem, readout, loss, what layers have in common), all other
    runs are sums of these; else every run is measured.

    Args:
        kinds: of the layers: equal numbers are alike.
        remakes: conditioned values are made again (train.recompute_modulation), where layers are not checkpointed.
    """

    def __init__(self, rehearsal: Rehearsal, kinds: tuple[int, ...], *, remakes: bool = False) -> None:
        self.rehearsal = rehearsal
        self.kinds = kinds
        self.remakes = remakes
        self.checkpointed = Meter(rehearsal, kinds) if remakes else self
        self.known: dict[tuple[tuple[int, ...], bool], int] = {}
        ways = (False,) if remakes else (False, True)
        self.additive = len(kinds) > 4 and all(self.adds_up(checkpointing) for checkpointing in ways)

    def adds_up(self, checkpointing: bool) -> bool:
        last = len(self.kinds) - 1
        neighbours = {self.kinds[i : i + 2]: (i, i + 1) for i in range(last)}
        shown = ((0, 2), *neighbours.values(), (0, last))
        return all(self.sum(*run, checkpointing) == self.measured(*run, checkpointing) for run in shown)

    def sum(self, first: int, last: int, checkpointing: bool) -> int:
        one, other = (self.measured(i, i, checkpointing) for i in range(2))
        shared = one + other - self.measured(0, 1, checkpointing)
        return shared + sum(self.measured(i, i, checkpointing) - shared for i in range(first, last + 1))

    def measured(self, first: int, last: int, checkpointing: bool) -> int:
        key = (self.kinds[first : last + 1], checkpointing)
        if key not in self.known:
            layers = range(first, last + 1)
            self.known[key] = self.rehearsal.kept(layers, checkpointing=checkpointing, remakes=self.remakes)
        return self.known[key]

    def kept(self, first: int, last: int, checkpointing: bool) -> int:
        """Of layers `first` to `last`, both included, with stem, readout and loss."""
        add = self.sum if self.additive else self.measured
        return add(first, last, checkpointing)

    def peak(self, first: int, last: int, checkpointing: bool) -> int:
        """With checkpointing a layer is run again for its backward pass: the largest of them counts too."""
        if not checkpointing:
            return self.kept(first, last, False)
        plain = self.checkpointed
        return plain.kept(first, last, True) + max(plain.recomputed(i) for i in range(first, last + 1))

    def end_to_end(self, checkpointing: bool) -> int:
        """Of the unconditioned network."""
        if not checkpointing:
            return self.rehearsal.kept(None)
        one_of_each = {kind: layer for layer, kind in enumerate(self.kinds)}.values()
        return max(self.rehearsal.kept(None, checkpointing=True, whole=layer) for layer in one_of_each)

    def recomputed(self, layer: int) -> int:
        return self.measured(layer, layer, False) - self.measured(layer, layer, True)
