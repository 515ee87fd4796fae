"""Analysis on fake tensors: the same Anatomy as on real ones, and no weight in memory."""

import networks
import pytest
import torch
import transformers
from torch import nn
from transformers.integrations import moe

from dbconvert.graph.analysis import analyse
from dbconvert.graph.fake import NEEDS_NUMBERS, build_up_to, empty_weights, is_empty
from dbconvert.sources.fake_runs import runnable_on_fake


def text(architecture, config, **options):
    def make():
        settings = getattr(transformers, config)(**{**networks.TEXT, **options, "use_cache": False})
        return getattr(transformers, architecture)(settings), {"input_ids": networks.tokens()}

    return make


WRITTEN_BY_HAND = (
    "vit",
    "gpt",
    "encoder_pre_seq_first",
    "encoder_post",
    "scaled",
    "conv_post",
    "sequential",
    "returns_dict",
)
FAMILIES = {
    **{name: networks.ACCEPTED[name] for name in WRITTEN_BY_HAND},
    **{name: make for name, make in networks.ACCEPTED.items() if name.startswith("hf_")},
    "mixtral": text("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_key_value_heads=2),
    "deepseek": text(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", n_routed_experts=4, n_group=1, topk_group=1, q_lora_rank=16,
        num_experts_per_tok=2, moe_intermediate_size=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=1, num_key_value_heads=4,
    ),
    "gemma3": text(
        "Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=8, sliding_window=8, num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "neox": text("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "mamba": text("MambaForCausalLM", "MambaConfig", state_size=4),
    "albert": text("AlbertForMaskedLM", "AlbertConfig", embedding_size=16),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_anatomy_is_that_of_real_tensors(name):
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    with empty_weights():
        empty, _ = FAMILIES[name]()
    assert is_empty(empty) and not is_empty(model)
    with runnable_on_fake(empty):
        found = analyse(empty, inputs)
    assert found == analyse(model, inputs)
    assert is_empty(empty)


def test_experts_run_on_fake_tensors_forwards_and_backwards():
    """And real ones keep the kernel that is theirs."""
    kernel = moe._can_use_grouped_mm
    with empty_weights():
        model, inputs = FAMILIES["mixtral"]()
    with runnable_on_fake(model):
        scores = model(**inputs).logits
        scores.sum().backward()
        given = [p.grad for name, p in model.named_parameters() if "experts" in name]
        assert scores.shape == (*networks.tokens().shape, networks.VOCABULARY)
        assert given and all(grad is not None for grad in given)
    assert moe._can_use_grouped_mm is kernel


def test_empty_weights_keep_ties_and_buffers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            weight = nn.Parameter(torch.randn(3, 3))
            self.a = self.b = weight
            self.c, self.d = nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.c.weight = self.a

    with empty_weights():
        model = Tied()
    assert model.a is model.b is model.c.weight and model.a.is_meta
    assert torch.equal(model.d.running_var, torch.ones(3))
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_build_ends_where_it_grows_too_large():
    assert build_up_to(lambda: nn.Linear(10, 10), 440) is not None
    assert build_up_to(lambda: nn.Linear(10, 10), 439) is None


def test_a_network_that_needs_numbers_says_so():
    class Deciding(networks.Net):
        def forward(self, x):
            return super().forward(x * float(self.stem.weight.sum().item()))

    with empty_weights():
        model = Deciding(networks.Block)
    with runnable_on_fake(model), pytest.raises(NEEDS_NUMBERS):
        analyse(model, {"x": networks.features()})
