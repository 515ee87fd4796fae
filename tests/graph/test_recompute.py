"""Activation checkpointing: the same gradients, the same random numbers and statistics, and less kept."""

import networks
import pytest
import torch
from torch import nn

from dbconvert.graph.account import saved_bytes
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import inject
from dbconvert.graph.tape import tensors
from tests.graph.test_around import Pairs
from tests.graph.test_halves import gradients, trial

WIDTH = 8


class Branch(nn.Sequential):
    def __init__(self):
        inner = nn.Linear(networks.WIDTH, networks.WIDTH)
        super().__init__(nn.LayerNorm(networks.WIDTH), inner, nn.GELU(), nn.Dropout(0.2))


def built(name):
    if name != "pairs":
        return networks.build(name)
    torch.manual_seed(0)
    return Pairs(lambda _, part, x: x + part(x), Branch).eval(), {"x": networks.features()}


def update(network, run, inputs, condition, active, checkpointed):
    """Gradients and buffers after one forward and backward pass in train mode."""
    network.train().zero_grad()
    run.condition, run.active, run.checkpointed = condition, active, checkpointed
    torch.manual_seed(1)
    tensors(network(**inputs))[0][1].square().sum().backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {**found, **{name: buffer.clone() for name, buffer in network.named_buffers()}}


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize(
    "name", ["vit", "encoder_post", "conv_stem", "functional_norm", "returns_dict", "hf_llama", "hf_bert", "pairs"]
)
def test_gradients_and_statistics_are_the_same(name, conditioned):
    model, inputs = built(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    anatomy = analyse(model, inputs)
    run = inject(model, anatomy, blocks=1, width=WIDTH, start="original")
    for parameter in model.dbconvert.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    condition = torch.randn(len(next(iter(inputs.values()))), WIDTH) if conditioned else None
    active = range(1, 3) if conditioned else None
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    plain = update(model, run, inputs, condition, active, ())
    model.load_state_dict(before, strict=False)
    again = update(model, run, inputs, condition, active, range(anatomy.depth))
    assert plain.keys() == again.keys() and len(plain) > 4
    for key, value in plain.items():
        scale = float(value.abs().max().clamp(min=1)) if value.is_floating_point() else 1.0
        assert torch.allclose(again[key], value, atol=1e-6 * scale), key


def test_the_last_layer_may_leave_the_clean_half_out():
    asked, sides = trial("gpt")
    for active in (range(asked.anatomy.depth), range(1)):
        asked.run.checkpointed = ()
        plain = gradients(asked, sides, active, halves=True)
        asked.run.checkpointed = range(asked.anatomy.depth)
        again = gradients(asked, sides, active, halves=True)
        assert plain.keys() == again.keys()
        for key, gradient in plain.items():
            assert torch.allclose(again[key], gradient, atol=1e-6 * float(gradient.abs().max().clamp(min=1))), key


def test_what_enters_a_layer_is_kept_and_no_more():
    model, inputs = networks.build("vit")
    anatomy = analyse(model, inputs)
    run = inject(model, anatomy, blocks=1, width=WIDTH, start="original")
    run.condition = torch.randn(2, WIDTH)
    counted = {}
    for layers in ((), range(1, anatomy.depth), range(anatomy.depth)):
        run.checkpointed = layers
        counted[len(layers)] = saved_bytes(lambda: model(**inputs).square().sum(), model.parameters())
    stream = 4 * torch.Size(anatomy.stream_shape).numel()
    one = counted[anatomy.depth - 1] - counted[anatomy.depth]
    assert counted[0] - counted[anatomy.depth] == pytest.approx(one * anatomy.depth, rel=0.1) and one > 5 * stream


def test_nothing_runs_twice_where_there_are_no_gradients():
    model, inputs = networks.build("vit")
    anatomy = analyse(model, inputs)
    run = inject(model, anatomy, blocks=1, width=WIDTH, start="original")
    run.checkpointed = range(anatomy.depth)
    calls = []
    model.get_submodule(anatomy.layers[0].path).register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(**inputs)
    assert len(calls) == 1
    model(**inputs).sum().backward()
    assert len(calls) == 3
