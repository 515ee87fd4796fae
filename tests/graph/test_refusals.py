"""Networks that cannot be cut are refused with the node and the reason."""

import warnings
from dataclasses import replace

import networks
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dbconvert.errors import Refused
from dbconvert.graph.analysis import analyse
from dbconvert.graph.proof import prove


def test_dimensions_name_both_shapes():
    make, _, _ = networks.REFUSED["unet"]
    model, inputs = make()
    with pytest.raises(Refused, match=r"\[2, 8, 16, 16\] to \[2, 16, 8, 8\]"):
        analyse(model, inputs)


def test_a_part_of_a_pyramid_is_restricted():
    make, _, _ = networks.REFUSED["unet"]
    model, inputs = make()
    anatomy = analyse(model, inputs, stack="down.1.layers")
    assert (anatomy.verdict, anatomy.depth, anatomy.width) == ("restricted", 2, 16)
    assert anatomy.axes.channel == -3
    assert prove(model, anatomy, inputs).proof[0].passed


def test_a_skip_around_the_stack_is_no_layer():
    """As in networks that restore pictures: the network tells what is to be added to its input."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
            self.layers = nn.Sequential(*[networks.ConvLayer(16) for _ in range(4)])

        def forward(self, x):
            return x + self.leave(self.layers(self.enter(x)))

    model, inputs = Around().eval(), {"x": networks.images()}
    anatomy = prove(model, analyse(model, inputs), inputs)
    assert (anatomy.verdict, anatomy.stack, anatomy.depth) == ("accepted", "layers", 4)


def test_a_branch_that_ends_in_an_attribute_is_refused():
    class Mixing(networks.PreNormMLP):
        def forward(self, x):
            return super().forward(x + torch.fft.fft2(x).real)

    with pytest.raises(Refused, match="ends in `getattr`") as caught:
        analyse(networks.Net(Mixing), {"x": networks.features()})
    assert "as modules" in caught.value.hint


def test_layers_beside_the_stack_are_told():
    wide = nn.Sequential(*[networks.ConvLayer(16) for _ in range(4)])
    narrow = nn.Sequential(*[networks.ConvLayer(8) for _ in range(2)])
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), narrow, nn.Conv2d(8, 16, 2, 2), wide)
    anatomy = analyse(model, {"input": networks.images()})
    assert (anatomy.verdict, anatomy.stack, anatomy.width) == ("restricted", "3", 16)
    assert "1: 2 layers" in anatomy.notes[0]


def test_a_readout_of_several_depths_is_told():
    anatomy = analyse(networks.AllDepths(networks.Block), {"x": networks.features()})
    assert anatomy.verdict == "accepted" and "layers.0, layers.1, layers.2 is also read" in anatomy.notes[0]
    assert not analyse(*networks.build("vit")).notes


def test_several_stacks_can_be_chosen():
    make, _, _ = networks.REFUSED["two_stacks"]
    model, inputs = make()
    assert analyse(model, inputs, stack="right").stack == "right"
    with pytest.raises(Refused, match="no module middle"):
        analyse(model, inputs, stack="middle")
    with pytest.raises(Refused, match="holds no stack"):
        analyse(model, inputs, stack="head")


def test_looped_layers_are_told():
    model = networks.Net(networks.Block)
    model.layers[2], model.layers[3] = model.layers[0], model.layers[1]
    anatomy = analyse(model, {"x": networks.features()})
    assert (anatomy.verdict, anatomy.depth, anatomy.calls) == ("looped", 2, 2)


def test_scripted_layers_are_refused():
    scripted = nn.ModuleList([torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 8)])
    with pytest.raises(Refused, match="scripted"):
        analyse(nn.Sequential(*scripted), {"input": networks.features()})


def test_a_path_that_depends_on_the_batch_is_refused():
    class Odd(networks.Block):
        def forward(self, x):
            return super().forward(x.sin() if len(x) % 2 else x)

    with pytest.raises(Refused) as caught:
        analyse(networks.Net(Odd), {"x": networks.features()})
    assert caught.value.kind == "control-flow"


def test_a_stem_may_depend_on_the_batch():
    class Odd(networks.Net):
        def forward(self, x):
            return super().forward(x.sin() if len(x) % 2 else x)

    model, inputs = Odd(networks.Block).eval(), {"x": networks.features()}
    anatomy = analyse(model, inputs)
    assert anatomy.axes.batch == 0 and all(check.passed for check in prove(model, anatomy, inputs).proof)


def test_checkpoints_with_a_backward_pass_of_their_own_are_refused():
    class Checkpointed(networks.Block):
        def __init__(self, reentrant):
            super().__init__()
            self.reentrant = reentrant

        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=self.reentrant)

    model, inputs = networks.Net(lambda: Checkpointed(False)).eval(), {"x": networks.features()}
    assert all(check.passed for check in prove(model, analyse(model, inputs), inputs).proof)
    model = networks.Net(lambda: Checkpointed(True)).eval()
    with pytest.raises(Refused, match="backward pass of their own") as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: inputs without gradient
        prove(model, analyse(model, inputs), inputs)
    assert "use_reentrant=False" in caught.value.hint


def test_conditioning_that_does_not_fit_fails_the_proof():
    model, inputs = networks.build("scaled")
    anatomy = analyse(model, inputs)
    layer = anatomy.layers[0]
    branch = replace(layer.branches[0], norm=replace(layer.branches[0].norm, features=3))
    wrong = replace(layer, branches=(branch, *layer.branches[1:]))
    with pytest.raises(Refused, match="proof by numbers failed") as caught:
        prove(model, replace(anatomy, layers=(wrong, *anatomy.layers[1:])), inputs)
    assert "size of tensor" in caught.value.node
    assert not any("dbconvert" in name for name, _ in model.named_modules())


def test_branches_that_start_at_zero_do_not_hide_their_sites():
    model, inputs = networks.build("scaled")
    for name, parameter in model.named_parameters():
        if "gamma" in name or name.startswith("head"):
            torch.nn.init.zeros_(parameter)
    assert all(check.passed for check in prove(model, analyse(model, inputs), inputs).proof)
    assert not model.head.weight.any()


def test_the_network_is_left_as_it_was():
    model, inputs = networks.build("vit")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prove(model, analyse(model, inputs), inputs)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_some_layers_of_a_stack():
    model, inputs = networks.build("vit")
    anatomy = prove(model, analyse(model, inputs, stack="blocks[1:3]"), inputs)
    assert anatomy.layer_paths() == ("blocks.1", "blocks.2") and anatomy.verdict == "restricted"
    assert set(anatomy.left_out) == {"blocks.0", "blocks.3"} and anatomy.layer_of("blocks.0.norm1.weight") is None
    assert analyse(model, inputs, stack="blocks[-2:]").layer_paths() == ("blocks.2", "blocks.3")
    with pytest.raises(Refused, match="keeps 1 of 4 layers"):
        analyse(model, inputs, stack="blocks[3:]")
    with pytest.raises(Refused, match="no module nowhere"):
        analyse(model, inputs, stack="nowhere[1:3]")


def test_the_parts_that_would_convert_are_offered():
    model, inputs, *_ = (*networks.REFUSED["side_product"][0](),)
    with pytest.raises(Refused) as caught:
        analyse(model.eval(), inputs)
    assert caught.value.facts["stacks"] == ["layers[1:]"] and "--stack layers[1:] (3 layers)" in caught.value.hint
    assert analyse(model, inputs, stack="layers[1:]").depth == 3
    model, inputs = networks.REFUSED["two_stacks"][0]()
    with pytest.raises(Refused) as caught:
        analyse(model.eval(), inputs)
    assert caught.value.facts["stacks"] == ["left", "right"]


def test_a_moved_function_call_is_found():
    """A layer that calls its functions in another order in train mode: the site would mean another call there."""

    class Moody(networks.FunctionalNorm):
        def forward(self, x):
            if self.training:
                torch.nn.functional.layer_norm(x, (networks.WIDTH,))
            return super().forward(x)

    model, inputs = networks.Net(Moody).eval(), {"x": networks.features()}
    with pytest.raises(Refused, match="sites at function calls") as caught:
        prove(model, analyse(model, inputs), inputs)
    assert "train mode: layer_norm 0 in layers.0" in caught.value.node


class Around(nn.Module):
    """Branches in lists of their own, added in the network's forward; `between` is done to the stream after each."""

    def __init__(self, between, *, lists):
        super().__init__()
        self.stem, self.head, self.between = nn.Linear(8, networks.WIDTH), nn.Linear(networks.WIDTH, 3), between
        self.first = nn.ModuleList(networks.PreNormMLP().mlp for _ in range(3))
        self.second = nn.ModuleList(networks.PreNormMLP().mlp for _ in range(3)) if lists > 1 else []

    def forward(self, x):
        mask = (x.sum(-1, keepdim=True) > -9).float()
        x = self.stem(x)
        for i, first in enumerate(self.first):
            x = self.between(x + first(x), mask)
            x = x + self.second[i](x) if self.second else x
        return self.head(x.mean(1))


def plain(x, _):
    return x


def masked(x, mask):
    return x * mask


@pytest.mark.parametrize(
    ("between", "lists", "parallel", "multiplied"),
    [(masked, 2, True, True), (plain, 2, True, False), (masked, 1, False, True)],
)
def test_additions_around_modules(between, lists, parallel, multiplied):
    with pytest.raises(Refused, match="added to the stream outside of it, in the forward of Around") as caught:
        analyse(Around(between, lists=lists).eval(), {"x": networks.features()})
    told = caught.value
    assert told.kind == "around" and "node add" in told.node and "adapter" not in told.hint
    assert ("the parts of one layer, which lie in first, second" in told.reason) == parallel
    assert ("multiplied by another tensor" in told.reason) == ("node mul" in told.node) == multiplied


def test_one_list_of_branches_on_an_unbroken_stream_is_something_else():
    with pytest.raises(Refused, match=r"the residual addition of first\.0 is written outside of it") as caught:
        analyse(Around(plain, lists=1).eval(), {"x": networks.features()})
    assert caught.value.kind == "functional"


class Balanced(nn.Module):
    """A layer that returns an auxiliary loss beside its stream."""

    def __init__(self):
        super().__init__()
        self.norm, self.down = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.down(self.norm(x)), x.mean()


class AddsLosses(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layers = nn.Linear(4, 8), nn.ModuleList(Balanced() for _ in range(3))

    def forward(self, x):
        x, self.loss = self.stem(x), torch.zeros(())
        for layer in self.layers:
            x, loss = layer(x)
            self.loss = self.loss + loss
        return x


def test_what_skipped_layers_do_not_return_must_not_be_needed():
    model, inputs = AddsLosses(), {"x": torch.randn(2, 4)}
    with pytest.raises(Refused, match="fails where layers hand their stream on") as refused:
        prove(model, analyse(model, inputs), inputs)
    assert "auxiliary loss" in refused.value.hint
