"""Conditioning at modules and conditioning at function calls are two ways to one result: each checks the other."""

import copy
from dataclasses import replace

import pytest
import torch

from dbconvert.anatomy import FunctionCall
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import inject
from dbconvert.graph.tape import _Tape, called, tensors
from dbconvert.graph.untouched import no_fast_paths
from tests.acceptance.table import CONVERTED

ROWS = [name for name, row in CONVERTED.items() if not row.conditioned]
LEAST = 40
"""Rows in which at least one site can be put at a function call; fewer would mean that the test has lost its grip."""
installed = []


def by_functions(model, inputs, anatomy):
    """The anatomy with its sites at the function calls that return what the modules return, counted from the layer."""
    tape = _Tape(model, deep=False)
    tape.leaf_modules = set()
    recording = tape.run((), inputs)

    def moved(site, layer, output):
        path = f"{layer.path}.{site.module}".rstrip(".")
        if site.call is not None or getattr(site, "arguments", ()) or getattr(site, "uses", ()):
            return site
        node = dict(recording.calls_of(path)[0].outputs)[output]
        if "nth" not in node.meta or not {path, layer.path} <= set(node.meta["scope"]):
            return site
        nth = node.meta["nth"][node.meta["scope"].index(layer.path)]
        whole = {"output": ()} if output else {}
        return replace(site, module="", call=FunctionCall(called(node.target), nth), **whole)

    layers = []
    for layer in anatomy.layers:
        branches = tuple(
            replace(b, norm=moved(b.norm, layer, ()), gate=moved(b.gate, layer, b.gate.output)) for b in layer.branches
        )
        layers.append(replace(layer, branches=branches))
    return replace(anatomy, layers=tuple(layers))


def modulated(model, inputs, anatomy):
    changed = copy.deepcopy(model)
    run = inject(changed, anatomy, blocks=2, width=8, start="original")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in changed.dbconvert.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        run.condition = torch.randn(len(next(iter(inputs.values()))), 8, generator=generator)
        return [value for _, value in tensors(changed(**inputs)) if value.is_floating_point()]


@pytest.mark.parametrize("name", ROWS)
def test_both_ways_agree(name):
    row = CONVERTED[name]
    model, inputs = row.build()
    with no_fast_paths():
        anatomy = analyse(model, inputs, stack=row.stack)
        other = by_functions(model, inputs, anatomy)
        if other == anatomy:
            pytest.skip("no site of this network can be put at a function call")
        installed.append(name)
        for a, b in zip(modulated(model, inputs, anatomy), modulated(model, inputs, other), strict=True):
            assert (a - b).abs().max() <= 4e-6


def test_most_networks_can_be_done_both_ways(request):
    if len(request.session.items) < len(ROWS):
        pytest.skip("only asked when all rows ran")
    assert len(installed) >= LEAST
