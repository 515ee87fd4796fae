"""Where conditioning is put in each kind of residual branch, and that it acts along the channels."""

import pytest
import torch
from networks import WIDTH, ConvNet, Net, images

from dbconvert.errors import Refused
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import inject
from dbconvert.graph.proof import prove
from tests.acceptance.written import BRANCHES, CONVOLUTIONS, CausalConvolutions, Summed, sequence


def branches_of(model, inputs):
    anatomy = prove(model, analyse(model, inputs), inputs)
    assert anatomy.verdict == "accepted" and all(check.passed for check in anatomy.proof)
    return anatomy, anatomy.layers[0].branches


@pytest.mark.parametrize("name", BRANCHES)
def test_placement(name):
    layer, placement, norm, gates = BRANCHES[name]
    model, inputs = Net(layer, depth=2).eval(), {"x": sequence()}
    anatomy, branches = branches_of(model, inputs)
    assert {(branch.placement, branch.norm.module) for branch in branches} == {(placement, norm)}
    assert {branch.gate.module for branch in branches} <= set(gates.split())
    assert anatomy.post_norm == (placement == "spine")
    check_channels(model, anatomy, inputs, channel=-1)


def test_a_layer_that_scales_its_stream_is_never_the_identity():
    model, inputs = Net(lambda: Summed(lambda x, y: 0.9 * x + 0.1 * y)).eval(), {"x": sequence()}
    anatomy, branches = branches_of(model, inputs)
    assert anatomy.post_norm and branches[0].placement == "pre"
    with pytest.raises(Refused, match="a scaling stands"):
        inject(model, anatomy, blocks=1, width=8, start="zero")


@pytest.mark.parametrize("join", [lambda x, y: y - x, lambda x, y: torch.add(y, x, alpha=0.5)])
def test_what_does_not_hand_the_stream_on_is_refused(join):
    with pytest.raises(Refused, match="not residual"):
        analyse(Net(lambda: Summed(join)).eval(), {"x": sequence()})


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_placement_in_convolutions(name):
    model, inputs = ConvNet(CONVOLUTIONS[name]).eval(), {"x": images()}
    anatomy, branches = branches_of(model, inputs)
    assert [(b.placement, b.norm.module, b.gate.module) for b in branches] == [("pre", "norm", "conv")]
    check_channels(model, anatomy, inputs, channel=-3)


@pytest.mark.parametrize("length", [12, WIDTH])
def test_channels_are_told_through_paddings_and_views(length):
    """Also where the sequence is as long as the stream is wide."""
    ids = torch.randint(9, (2, length), generator=torch.Generator().manual_seed(0))
    anatomy, branches = branches_of(CausalConvolutions().eval(), {"ids": ids})
    assert anatomy.axes.channel == -2 and anatomy.width == WIDTH
    assert [(b.placement, b.norm.features, b.gate.module) for b in branches] == [("input", WIDTH, "out")]


def check_channels(model, anatomy, inputs, channel):
    """A modulation of one channel changes this channel of the modulated value, at every position, and no other."""
    path = anatomy.layers[0].path
    branch = anatomy.layers[0].branches[0]
    run = inject(model, anatomy, blocks=1, width=8, start="original")
    site = model.get_submodule(f"{path}.{branch.norm.module}")
    modulation = model.dbconvert.modulation["0"].linear
    seen = []
    what = site.register_forward_pre_hook if branch.placement == "input" else site.register_forward_hook
    inner = next(iter(site.children()), site) if branch.placement == "input" else site
    watch = inner.register_forward_pre_hook if branch.placement == "input" else what
    hook = watch(lambda _, args, *out: seen.append((out[0] if out else args[0]).detach().clone()))
    for shift in (0.0, 1.0):
        with torch.no_grad():
            modulation.bias[3] = shift
            run.condition = torch.zeros(2, 8)
            model(**inputs)
    hook.remove()
    changed = (seen[1] - seen[0]).movedim(channel, 0)
    assert changed.shape[0] == WIDTH and bool((changed[3] != 0).all())
    assert not changed[[i for i in range(WIDTH) if i != 3]].any()
