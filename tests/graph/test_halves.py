"""The last layer of a block runs on the noisy half alone, with the clean half's keys and values: nothing changes."""

import pytest
import torch

from dbconvert.graph.attention import ATTENTION
from dbconvert.graph.halves import LastLayer
from dbconvert.graph.inject import PREFIX, inject
from dbconvert.graph.oracle import WIDTH, Trial, ask
from dbconvert.graph.two_streams import TwoStreams
from tests.graph.test_oracle import opened

LENGTH = 9


def trial(name):
    model, anatomy = opened(name)
    sides, halves = ask(model, anatomy)
    assert halves
    torch.manual_seed(0)
    run = inject(model, anatomy, blocks=1, width=WIDTH, start="original")
    for modulation in model.get_submodule(f"{PREFIX}.modulation").parameters():
        torch.nn.init.normal_(modulation, std=0.1)
    tokens = torch.randint(0, anatomy.embedding.rows, (2, LENGTH))
    noisy = torch.randn(2, LENGTH, anatomy.embedding.width)
    return Trial(model, anatomy, run, tokens, noisy, (torch.randn(2, WIDTH), torch.randn(2, WIDTH))), {
        side.argument: side for side in sides
    }


def gradients(trial, sides, active, *, halves):
    trial.model.zero_grad()
    streams = TwoStreams(LENGTH, trial.anatomy.axes, sides)
    trial.together(streams, active, halves=halves).square().mean().backward()
    return {name: p.grad.clone() for name, p in trial.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["gpt", "hf_llama", "hf_mistral", "hf_deepseek_v3"])
def test_gradients_are_those_of_the_whole(name):
    asked, sides = trial(name)
    for active in (range(asked.anatomy.depth), range(1)):
        whole = gradients(asked, sides, active, halves=False)
        half = gradients(asked, sides, active, halves=True)
        assert whole.keys() == half.keys()
        for key, gradient in whole.items():
            assert torch.allclose(half[key], gradient, atol=1e-6 * float(gradient.abs().max().clamp(min=1))), key


def test_only_the_last_active_layer_leaves_the_clean_half_out():
    asked, sides = trial("hf_llama")
    seen = {}
    for index, layer in enumerate(asked.anatomy.layers):
        mlp = asked.model.get_submodule(f"{layer.path}.mlp")
        mlp.register_forward_hook(lambda _, args, out, index=index: seen.setdefault(index, []).append(out.shape[1]))
    for active in (range(2), range(1)):
        seen.clear()
        asked.together(TwoStreams(LENGTH, asked.anatomy.axes, sides), active, halves=True)
        assert seen == {i: [LENGTH if i == active[-1] else 2 * LENGTH] for i in active}


def test_layers_that_are_recomputed_run_whole():
    asked, sides = trial("hf_llama")
    whole = gradients(asked, sides, None, halves=True)
    asked.model.train()
    enable = getattr(asked.model, "activation_checkpointing_enable", asked.model.gradient_checkpointing_enable)
    enable()
    again = gradients(asked, sides, None, halves=True)
    for key, gradient in whole.items():
        assert torch.allclose(again[key], gradient, atol=1e-6 * float(gradient.abs().max().clamp(min=1))), key


def test_a_layer_that_attends_twice_is_told():
    asked, sides = trial("gpt")
    streams = TwoStreams(LENGTH, asked.anatomy.axes, sides)

    def call(stream, condition):
        with streams.attention(0):
            for _ in range(2):
                stream = ATTENTION(stream, stream, stream)
        return stream

    with pytest.raises(Exception, match="attend exactly once"):
        LastLayer(streams)(call, (0,), torch.randn(2, 2 * LENGTH, 4), torch.randn(2, 2, WIDTH))
