"""Networks that see both ways: masks opened, documents kept apart, and what cannot be opened refused."""

from dataclasses import replace

import networks
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from dbconvert.errors import Refused
from dbconvert.graph.analysis import analyse
from dbconvert.graph.oracle import is_causal
from dbconvert.graph.seeing import ask_both_ways
from dbconvert.graph.sight import both_ways, limited
from tests.acceptance.table import CONVERTED

CAUSAL = [
    "gpt", "gpt_inline", "gpt_multihead", "gpt_encoder", "hf_bloom", "hf_cohere", "hf_deepseek_v3", "hf_falcon",
    "hf_gemma2", "hf_gemma3", "hf_gpt2", "hf_gpt_neox", "hf_gptj", "hf_granite", "hf_llama", "hf_mistral",
    "hf_mixtral", "hf_olmo2", "hf_opt", "hf_phi", "hf_qwen2", "hf_qwen3",
]  # fmt: skip
RECURRENT = {"hf_mamba": "backbone.layers.0", "hf_jamba": "model.layers.0"}
BOTH_WAYS = ["hf_bert", "hf_modernbert", "hf_albert"]
LOW = torch.finfo(torch.float32).min


def opened(model, inputs, stack=None):
    anatomy = analyse(model, inputs, stack=stack)
    return ask_both_ways(model, replace(anatomy, causal=is_causal(model, anatomy)))


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_networks_are_opened(name):
    _, apart = opened(*CONVERTED[name].build(), CONVERTED[name].stack)
    assert apart


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_refused_by_name(name):
    with pytest.raises(Refused, match=RECURRENT[name]) as caught:
        opened(*CONVERTED[name].build(), CONVERTED[name].stack)
    assert caught.value.kind == "one-way"


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_bidirectional_networks_keep_documents_apart(name):
    _, apart = opened(*CONVERTED[name].build(), CONVERTED[name].stack)
    assert apart


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sliding_windows_reach_both_ways(attention):
    config = transformers.MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=61, sliding_window=4, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    _, apart = opened(transformers.MistralForCausalLM(config), {"input_ids": networks.tokens()})
    assert apart


def test_bidirectional_networks_are_left_as_they_are():
    model, inputs = networks.build("hf_bert")
    sides, apart = opened(model, inputs)
    assert apart and all(len(side.sequence) < 2 for side in sides)


class ByHand(nn.Module):
    """Attention that hides the future with a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(networks.WIDTH), nn.Linear(networks.WIDTH, 3 * networks.WIDTH)
        self.out = nn.Linear(networks.WIDTH, networks.WIDTH)
        self.register_buffer("future", torch.ones(64, 64).triu(1).bool(), persistent=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        length = x.shape[1]
        scores = (q @ k.transpose(-2, -1)).masked_fill(self.future[:length, :length], float("-inf"))
        return x + self.out(scores.softmax(-1) @ v)


class Convolved(nn.Module):
    """Sees the past by a convolution."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(networks.WIDTH), nn.Conv1d(networks.WIDTH, networks.WIDTH, 3)

    def forward(self, x):
        return x + self.conv(F.pad(self.norm(x).transpose(1, 2), (2, 0))).transpose(1, 2)


@pytest.mark.parametrize("layer", [ByHand, Convolved])
def test_what_cannot_be_opened_is_refused_by_name(layer):
    with pytest.raises(Refused, match="do not see the later ones") as caught:
        opened(networks.GPT(layer), {"ids": networks.tokens()})
    assert caught.value.kind == "one-way" and f"h.0 ({layer.__name__})" in str(caught.value)


def test_one_causal_layer_among_open_ones_is_found():
    model = networks.GPT()
    model.h[2] = Convolved()
    with pytest.raises(Refused, match=r"h\.2"):
        opened(model, {"ids": networks.tokens()})


def test_masks():
    causal = torch.ones(4, 4).tril().bool()
    window = causal & ~torch.ones(4, 4).tril(-2).bool()
    padded = causal & torch.tensor([True, True, True, False])
    near = (torch.arange(4)[:, None] - torch.arange(4)).abs() < 2
    shown = torch.tensor([True, True, True, False]).expand(4, 4)
    for mask, expected in ((causal, torch.ones(4, 4).bool()), (window, near), (padded, shown)):
        assert torch.equal(both_ways(mask), expected)
        assert torch.equal(both_ways(torch.where(mask, 0.0, LOW)), torch.where(expected, 0.0, LOW))
        assert torch.equal(both_ways(~mask), ~expected)
    assert torch.equal(both_ways(torch.zeros(4, 4).masked_fill(~causal, -torch.inf)), torch.zeros(4, 4))
    halves = (torch.arange(4)[:, None] // 2 == torch.arange(4) // 2)[None]
    assert torch.equal(limited(both_ways(causal)[None, None], halves)[0], halves)
    assert torch.equal(limited(torch.zeros(1, 1, 4, 4), halves)[0], torch.where(halves, 0.0, LOW))
