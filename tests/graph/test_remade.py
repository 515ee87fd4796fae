"""Conditioned values made again for the backward pass: the same gradients to the bit, and less kept."""

from contextlib import nullcontext
from functools import partial

import networks
import pytest
import torch
from torch import nn

from dbconvert.anatomy import Axes
from dbconvert.conditioning.modulation import modulate
from dbconvert.engine.prepare import prepare, read_origin
from dbconvert.graph.account import saved_bytes
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import inject
from dbconvert.graph.remade import remade, remaking, run_again
from dbconvert.graph.tape import tensors
from tests.graph.test_recompute import WIDTH, built


def converted(name):
    model, inputs = built(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    anatomy = analyse(model, inputs)
    run = inject(model, anatomy, blocks=1, width=WIDTH, start="original")
    for parameter in model.dbconvert.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    run.condition = torch.randn(len(next(iter(inputs.values()))), WIDTH, requires_grad=True)
    return model, inputs, run


def gradients(model, inputs, run, remakes, context, instead=None):
    model.train().zero_grad()
    run.remakes, run.condition.grad = remakes, None
    torch.manual_seed(1)
    with context:
        out = model(**inputs) if instead is None else torch.func.functional_call(model, instead, kwargs=inputs)
        loss = tensors(out)[0][1].float().square().sum()
    loss.backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    given = {name: p.grad.clone() for name, p in (instead or {}).items() if p.grad is not None}
    return {**own, **given, "condition": run.condition.grad.clone()}


@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize(
    "name",
    ["vit", "encoder_post", "conv_stem", "functional_norm", "returns_dict", "hf_llama", "hf_bert", "pairs"],
)
def test_gradients_are_the_same_to_the_bit(name, cast):
    model, inputs, run = converted(name)
    context = partial(torch.autocast, "cpu", torch.bfloat16) if cast else nullcontext
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    plain = gradients(model, inputs, run, False, context())
    model.load_state_dict(before, strict=False)
    again = gradients(model, inputs, run, True, context())
    assert plain.keys() == again.keys() and len(plain) > 4
    assert all(torch.equal(again[key], value) for key, value in plain.items())


def test_a_functional_call_is_made_again_with_what_it_was_given():
    model, inputs, run = converted("vit")
    found = []
    for remakes in (False, True):
        instead = {name: (1.5 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
        found.append(gradients(model, inputs, run, remakes, nullcontext(), instead))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 4
    assert all(torch.equal(found[1][key], value) for key, value in found[0].items())


def test_gradients_are_those_of_the_formula():
    norm, axes = nn.LayerNorm(4).double(), Axes(0, -1)
    mixed = torch.randn(4, 3, dtype=torch.double)

    def branch(stream, shift, scale):
        with remaking(nullcontext()):
            value = norm(stream)
            out = remade(partial(modulate, axes=axes), value, shift, scale, run_again(norm, norm.forward, (stream,)))
            return out @ mixed

    torch.manual_seed(0)
    given = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((2, 5, 4), (2, 4), (2, 4))]
    assert torch.autograd.gradcheck(branch, given)


def test_neither_normed_nor_modulated_values_are_kept():
    kept = {}
    model, inputs, run = converted("vit")
    layers = len(analyse(*networks.build("vit")).layers)
    for remakes in (False, True):
        run.remakes = remakes
        kept[remakes] = saved_bytes(lambda: model(**inputs).square().sum(), model.parameters())
    stream = 4 * torch.Size(analyse(*networks.build("vit")).stream_shape).numel()
    # Two norms a layer, two values each; beside the stream, rows of shift and scale stay.
    assert kept[False] - kept[True] == pytest.approx(4 * layers * stream, rel=0.25)


def test_a_value_that_was_written_to_is_kept_as_it_is():
    norm, axes = nn.LayerNorm(4), Axes(0, -1)
    weight = torch.randn(4, 4, requires_grad=True)
    stream, shift, scale = torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 4)

    def gradient(again):
        weight.grad = None
        with remaking(nullcontext()) if again else nullcontext():
            value = norm(stream.clone())
            entered = run_again(norm, norm.forward, (stream,)) if again else None
            out = remade(partial(modulate, axes=axes), value.detach(), shift, scale, entered)
            out.mul_(3.0)
            (out @ weight).square().sum().backward()
        return weight.grad.clone()

    assert torch.equal(gradient(True), gradient(False))


def test_what_is_changed_before_the_backward_pass_is_told():
    weight = torch.randn(4, 4, requires_grad=True)
    with remaking(nullcontext()):
        entered = torch.randn(5, 4)
        out = (entered @ weight).sum()
    entered.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


@pytest.mark.parametrize(("recipe", "most"), [("vit_digits", 1.15), ("ar_text_tiny", 3.3)])
def test_activations_of_an_update_fall_with_the_blocks(recipe, most, tmp_path):
    """docs/measure_step.py shows the figures: conditioning keeps next to nothing of its own."""
    from dbconvert.engine.memory import activations

    def largest(*overrides):
        asked = ["train.cpu=true", "train.batch=16", "train.recompute_modulation=true", *overrides]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        job = prepare(read_origin(recipe, asked), folder, None, lambda *_: None, keep_noise=False).job
        return max(activations(job, block, torch.device("cpu")) for block in job.units)

    whole = largest("train.method=end-to-end", "split.blocks=1")
    for blocks in (2, 3, 6) if recipe == "vit_digits" else (3,):
        assert largest(f"split.blocks={blocks}") * blocks <= most * whole
