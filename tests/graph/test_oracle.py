"""[clean ; noisy] in one pass: right for every causal family, and every mistake that trains silently is caught."""

import networks
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dbconvert.anatomy import Axes
from dbconvert.errors import DBConvertError, Refused
from dbconvert.graph import oracle, two_streams
from dbconvert.graph.analysis import analyse
from dbconvert.graph.two_streams import TwoStreams, noisy_rows, two_stream_mask
from tests.acceptance.table import CONVERTED

CAUSAL = [
    "gpt", "gpt_inline", "gpt_multihead", "gpt_encoder", "hf_gpt2", "hf_opt", "hf_llama", "hf_qwen2", "hf_qwen3",
    "hf_mistral", "hf_gemma2", "hf_gemma3", "hf_gpt_neox", "hf_gpt_neox_sequential", "hf_gptj", "hf_falcon", "hf_phi",
    "hf_bloom", "hf_olmo2", "hf_granite", "hf_cohere", "hf_mixtral", "hf_deepseek_v3",
]  # fmt: skip
BY_HAND = ["hf_gptj", "hf_bloom", "hf_gemma2"]
"""Attention that is not torch's: the last layer of a block cannot be run for keys and values only."""
RECURRENT = {"hf_mamba": "backbone.layers.0", "hf_jamba": "model.layers.0"}
BIDIRECTIONAL = ["hf_bert", "hf_modernbert"]


def opened(name):
    row = CONVERTED[name]
    model, inputs = row.build()
    return model, analyse(model, inputs, stack=row.stack)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_noisy_half_sees_what_its_clean_prefix_shows(name):
    model, anatomy = opened(name)
    assert oracle.is_causal(model, anatomy)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, halves = oracle.ask(model, anatomy)
    assert halves == (name not in BY_HAND)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_language_model_of_the_table_is_asked():
    told = {*CAUSAL, *RECURRENT, *BIDIRECTIONAL}
    for name, row in CONVERTED.items():
        if row.verdict == "accepted" and name not in told:
            model, inputs = row.build()
            anatomy = analyse(model, inputs, stack=row.stack)
            assert anatomy.embedding is None or anatomy.head is None or anatomy.head.pooled, name


@pytest.mark.parametrize(("name", "layer"), RECURRENT.items())
def test_recurrent_layers_are_refused_by_name(name, layer):
    """They leak through the concatenation: the noisy half goes on from the last clean state."""
    model, anatomy = opened(name)
    with pytest.raises(Refused, match="does not show every noisy token") as refusal:
        oracle.ask(model, anatomy)
    assert layer in str(refusal.value) and "recurrent" in refusal.value.hint


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_bidirectional_networks_are_told_apart(name):
    assert oracle.is_causal(*opened(name)) is False


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["hf_llama", "hf_gpt2", "hf_mistral"])
def test_either_attention_of_transformers(name, attention):
    """A bool mask with eager attention would be added as 0 and 1: masks keep the kind that the stem made."""
    model, anatomy = opened(name)
    model.set_attn_implementation(attention)
    _, halves = oracle.ask(model, anatomy)
    assert halves == (attention == "sdpa")


def leaking(given, together=None):
    """Every noisy token sees its own clean copy: training would look wonderful."""
    rows = noisy_rows(given, together)
    seen = True if rows.dtype == torch.bool else 0.0
    rows[..., : given.shape[-1]].diagonal(dim1=-2, dim2=-1).fill_(seen)
    return rows


def blind(given, together=None):
    """The last clean token is not seen."""
    rows = noisy_rows(given, together)
    rows[..., : given.shape[-1]].diagonal(-1, dim1=-2, dim2=-1).fill_(two_streams.hidden(rows))
    return rows


@pytest.fixture
def fresh_masks():
    """Masks that depend on the length alone are kept from pass to pass."""
    two_streams.lasting.cache_clear()
    yield
    two_streams.lasting.cache_clear()


@pytest.mark.parametrize("wrong", [leaking, blind])
@pytest.mark.parametrize("name", ["gpt", "hf_gemma2"])
def test_a_wrong_mask_is_caught(name, wrong, monkeypatch, fresh_masks):
    monkeypatch.setattr(two_streams, "noisy_rows", wrong)
    with pytest.raises(Refused):
        oracle.ask(*opened(name))


def test_other_positions_of_the_noisy_half_are_caught(monkeypatch):
    """Positions that run on, S..2S-1, instead of beginning again."""
    plain = TwoStreams.beside

    def running_on(self, path, value):
        changed = plain(self, path, value)
        return changed.roll(1, 1) if path[0] == "position_embeddings" else changed

    monkeypatch.setattr(TwoStreams, "beside", running_on)
    with pytest.raises(Refused):
        oracle.ask(*opened("hf_llama"))


class ByHand(nn.Module):
    """Attention with a mask of its own, sized for the longest sequence."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(networks.WIDTH, 3 * networks.WIDTH), nn.Linear(networks.WIDTH, networks.WIDTH)
        self.register_buffer("mask", torch.ones(64, 64).tril().bool())

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2) / 6).masked_fill(~self.mask[: x.shape[1], : x.shape[1]], -1e9)
        return self.out(scores.softmax(-1) @ v)


class ByIndex(nn.Module):
    """The same through torch's attention, with a bias that goes by index."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(networks.WIDTH, 3 * networks.WIDTH), nn.Linear(networks.WIDTH, networks.WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        place = torch.arange(x.shape[1])
        bias = (place[None] - place[:, None]).float().masked_fill(place[None] > place[:, None], -torch.inf)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=bias)[:, 0])


def gpt_with(attention):
    torch.manual_seed(0)
    model = networks.GPT()
    for block in model.h:
        block.attention = attention()
    model.eval()
    return model, analyse(model, {"ids": networks.tokens()})


def test_masks_made_by_hand_are_refused_and_named():
    with pytest.raises(Refused, match="does not show") as refusal:
        oracle.ask(*gpt_with(ByHand))
    assert "h.0" in str(refusal.value) and "scaled_dot_product_attention" in refusal.value.hint


def test_biases_by_index_pass():
    """Made for 2S positions inside the layer, they hold those of the clean sequence in their corner."""
    sides, halves = oracle.ask(*gpt_with(ByIndex))
    assert sides == () and halves


# -- masks ------------------------------------------------------------------------------------------------------


def test_the_mask():
    mask = two_stream_mask(torch.ones(3, 3, dtype=torch.bool).tril())
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert mask.int().tolist() == expected


def test_documents_do_not_see_each_other():
    documents = torch.tensor([[0, 0, 1]])
    together = documents[:, :, None] == documents[:, None]
    mask = two_stream_mask(torch.ones(3, 3, dtype=torch.bool).tril(), together)[0]
    assert mask[2].int().tolist() == [0, 0, 1, 0, 0, 0] and mask[5].int().tolist() == [0, 0, 0, 0, 0, 1]
    assert mask[4].int().tolist() == [1, 0, 0, 0, 1, 0]


def test_an_added_mask_keeps_its_biases():
    given = torch.full((2, 2), torch.finfo(torch.float32).min).triu(1) + torch.tensor([[0.5, 0.0], [0.25, 0.5]])
    mask = two_stream_mask(given)
    least = torch.finfo(torch.float32).min
    assert mask[3].tolist() == [0.25, least, least, 0.5] and mask[2].tolist() == [least, least, 0.5, least]


def test_an_argument_that_was_not_there_before_is_refused():
    streams = TwoStreams(4, Axes(0, -1), {})
    with pytest.raises(DBConvertError, match=r"receive a tensor .* at extra"):
        streams.beside(("extra",), torch.zeros(2, 4))


class KeepsFunction(nn.Module):
    """A layer as minGPT writes it: its MLP is a function that was made of modules."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.projection = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = mlp = nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16), "drop": nn.Dropout()})
        self.mlpf = lambda x: mlp["drop"](mlp["down"](F.gelu(mlp["up"](x))))

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.projection(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        return x + self.mlpf(self.norm2(x))


def test_layers_may_keep_functions_of_their_modules():
    model = nn.Sequential(nn.Embedding(30, 16), KeepsFunction(), KeepsFunction(), nn.Linear(16, 30))
    anatomy = analyse(model, {"input": torch.randint(0, 30, (2, 8))})
    assert oracle.is_causal(model, anatomy)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    oracle.ask(model, anatomy)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "dbconvert")


class LastOnly(nn.Module):
    """A language model that scores the last position only, as nanoGPT where it is given no targets."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.layers = nn.Sequential(KeepsFunction(), KeepsFunction())

    def forward(self, tokens):
        return self.head(self.layers(self.embedding(tokens))[:, [-1]])


def test_a_head_that_reads_the_last_position_only_is_refused_with_the_way_out():
    model = LastOnly()
    anatomy = analyse(model, {"tokens": torch.randint(0, 30, (2, 8))})
    with pytest.raises(Refused, match="of 18 positions the head reads 1") as refusal:
        oracle.is_causal(model, anatomy)
    assert "in place of" in refusal.value.hint
