"""Layers whose additions are written in the loop around their modules."""

import networks
import pytest
import torch
from torch import nn

from dbconvert.errors import Refused
from dbconvert.graph.analysis import analyse
from dbconvert.graph.proof import prove

WIDTH = networks.WIDTH


class Pairs(nn.Module):
    """A list of pairs; `join` adds the result of a module to the stream."""

    def __init__(self, join, make):
        super().__init__()
        self.join = join
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.drop = nn.Dropout(0.1)
        self.layers = nn.ModuleList(nn.ModuleList([make(), make()]) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for pair in self.layers:
            for part in pair:
                x = self.join(self, part, x)
        return self.head(x.mean(1))


class Branch(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


class WithWeights(Branch):
    """Returns its result in a tuple."""

    def forward(self, x):
        return super().forward(x), x.mean()


JOINS = {
    "stream first": lambda _, part, x: x + part(x),
    "branch first": lambda _, part, x: part(x) + x,
    "torch.add": lambda _, part, x: torch.add(x, part(x)),
    "difference": lambda _, part, x: x - part(x),
    "scaled": lambda _, part, x: torch.add(x, part(x), alpha=0.5),
}


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_pairs_convert(join):
    model, inputs = Pairs(join, Branch).eval(), {"x": networks.features()}
    anatomy = prove(model, analyse(model, inputs), inputs)
    assert (anatomy.depth, anatomy.calls, anatomy.verdict) == (3, 1, "accepted") and len(anatomy.proof) == 4
    assert [branch.placement for branch in anatomy.layers[0].branches] == ["pre", "pre"]


def test_parts_may_return_tuples_and_be_single_modules():
    inputs = {"x": networks.features()}
    model = Pairs(lambda _, part, x: x + part(x)[0], WithWeights).eval()
    assert prove(model, analyse(model, inputs), inputs).layers[0].around.parts[0].form == "tuple:2"
    model = Pairs(lambda _, part, x: x + part(x), lambda: nn.Linear(WIDTH, WIDTH)).eval()
    branch = prove(model, analyse(model, inputs), inputs).layers[0].branches[0]
    assert (branch.placement, branch.norm.module, branch.gate.module) == ("input", "0", "0")


@pytest.mark.parametrize(
    "join",
    [
        lambda self, part, x: x + self.drop(part(x)),
        lambda self, part, x: x + 0.5 * part(x),
        lambda self, part, x: x + part(x) * x.mean(-1, keepdim=True),
    ],
)
def test_whatever_else_is_added_is_refused(join):
    model, inputs = Pairs(join, Branch).eval(), {"x": networks.features()}
    with pytest.raises(Refused) as caught:
        prove(model, analyse(model, inputs), inputs)
    assert caught.value.kind == "functional" and "layers.0" in caught.value.reason


class Bypassing(networks.Net):
    """Runs its layers by their forward, past what a module's call does."""

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer.forward(x)
        return self.head(x.mean(1))


def test_layers_run_by_their_forward_are_told():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = networks.Block()

        def forward(self, x):
            return self.block(x)

    with pytest.raises(Refused, match="calls its forward directly"):
        analyse(Bypassing(Inner).eval(), {"x": networks.features()})


def test_an_addition_in_a_part_of_a_list_is_refused():
    """As in networks whose lists hold norms, a branch and a module that adds."""

    class Adds(nn.Module):
        def forward(self, x, y):
            return x + y

    class Triples(Pairs):
        def __init__(self):
            super().__init__(None, Branch)
            self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(WIDTH), Branch(), Adds()]) for _ in range(3))

        def forward(self, x):
            x = self.stem(x)
            for norm, branch, add in self.layers:
                x = add(x, branch(norm(x)))
            return self.head(x.mean(1))

    with pytest.raises(Refused, match=r"layers.0 is a list of modules .* layers.0.2, adds") as caught:
        analyse(Triples().eval(), {"x": networks.features()})
    assert "one module" in caught.value.hint
