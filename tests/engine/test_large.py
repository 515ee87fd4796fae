"""Large networks: analysed without weights, proved on a twin, planned, and refused where they do not fit."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import networks
import pytest
import torch
import transformers
from engine.conftest import write_model

import dbconvert
from dbconvert.engine import opening, ram
from dbconvert.engine.twin import kind
from dbconvert.errors import DBConvertError, Refused
from dbconvert.recipe import SplitOptions
from dbconvert.sources.resolve import open_source

LLAMA_70B = dict(  # noqa: C408
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192,
)  # fmt: skip


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(opening, "LARGE", 0)


def saved(config, path):
    config.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("make", [networks.llama_config, networks.bert_config])
def test_a_large_network_has_the_same_anatomy_and_a_proof_on_a_twin(tmp_path, monkeypatch, make):
    source = saved(make(), tmp_path / "m")
    real = dbconvert.inspect(source)
    monkeypatch.setattr(opening, "LARGE", 0)
    found = dbconvert.inspect(source)
    assert replace(found, proof=()) == replace(real, proof=())
    assert [c.name for c in found.proof] == [c.name for c in real.proof] and all(c.passed for c in found.proof)
    assert all("on a twin of" in check.detail for check in found.proof)
    assert dbconvert.inspect(source, prove=True) == real


def test_no_twin_no_proof_and_a_note(tmp_path, everything_is_large):
    model = str(write_model(tmp_path / "m"))
    found = dbconvert.inspect(model)
    assert found.proof == () and "proved on the graph only" in found.notes[-1] and "--prove" in found.notes[-1]
    assert dbconvert.inspect(model, prove=True).proof


def test_a_twin_of_another_structure_is_none(tmp_path, everything_is_large, monkeypatch):
    """Every twin here has lost its expert layers."""
    options = dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16)  # noqa: C408
    config = transformers.DeepseekV3Config(
        **networks.TEXT, **options, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=1, architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip
    source = saved(config, tmp_path / "m")
    assert dbconvert.inspect(source).proof
    dense = open_source(source)
    dense.config.first_k_dense_replace = 4
    monkeypatch.setattr(type(dense), "twins", lambda _: iter([dense]))
    found = dbconvert.inspect(source)
    assert not found.proof and "no smaller network of the same structure" in found.notes[-1]


def test_refusals_are_the_same(tmp_path, everything_is_large):
    (tmp_path / "bad.py").write_text(
        "from torch import nn\n\ndef build_model():\n"
        "    layer = lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))\n"
        "    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*[layer() for _ in range(3)]))\n"
    )
    with pytest.raises(Refused, match="not residual"):
        dbconvert.inspect("bad.py")


def test_a_dry_run_plans_what_a_real_one_does(tmp_path, monkeypatch):
    source = saved(networks.vit_config(), tmp_path / "m")
    options = SplitOptions(blocks=2)
    real = dbconvert.split(source, options=options, dry_run=True)
    monkeypatch.setattr(opening, "LARGE", 0)
    found = dbconvert.split(source, options=options, dry_run=True)
    assert replace(found.plan, anatomy=real.plan.anatomy) == real.plan and found.noise == real.noise


def test_a_split_of_what_does_not_fit_is_refused_before_it_is_built(tmp_path, everything_is_large, monkeypatch):
    source = saved(networks.llama_config(), tmp_path / "m")
    monkeypatch.setattr(ram, "available_bytes", lambda: 1000)
    with pytest.raises(DBConvertError, match=r"do not fit into memory: they need .* GB, and 0.0 GB are free"):
        dbconvert.split(source, out="p")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    monkeypatch.setattr(ram, "available_bytes", lambda: 10**9)
    assert dbconvert.split(source, out="p").package is not None


def test_layers_of_one_kind_differ_in_size_only(tmp_path):
    networks.llama_config().save_pretrained(tmp_path / "m")
    layers = dbconvert.inspect(str(tmp_path / "m")).layers
    assert len({kind(layer) for layer in layers}) == 1
    assert kind(replace(layers[0], stream_in=("x",))) != kind(layers[1])


MEASURED = """
import re, sys
from pathlib import Path
from dbconvert.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
    print(end.code, peak, file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_70b_is_inspected_without_a_weight(tmp_path):
    """Peak memory of the whole command, imports included; the network would need 282 GB."""
    config = transformers.LlamaConfig(**LLAMA_70B, architectures=["LlamaForCausalLM"])
    command = [sys.executable, "-c", MEASURED, "inspect", saved(config, tmp_path / "m"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    code, peak = done.stderr.split()[-2:]
    assert code == "0" and found["layers"] == 80 and len(found["anatomy"]["proof"]) == 4
    assert int(peak) / 1024 < 600


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_70b_is_planned_without_a_weight(tmp_path):
    """With its task, its target table and its noise."""
    config = transformers.LlamaConfig(**LLAMA_70B, architectures=["LlamaForCausalLM"])
    source = saved(config, tmp_path / "m")
    command = [sys.executable, "-c", MEASURED, "split", source, "--blocks", "8", "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    code, peak = done.stderr.split()[-2:]
    assert code == "0" and json.loads(done.stdout)["task"] == "causal_lm"
    assert int(peak) / 1024 < 600


def test_a_build_within_a_limit_is_the_build(tmp_path):
    source = open_source(saved(networks.gpt2_config(), tmp_path / "m"))
    torch.manual_seed(3)
    plain = source.build().state_dict()
    torch.manual_seed(3)
    limited = source.build_within(2**30).state_dict()
    assert all(torch.equal(limited[name], value) for name, value in plain.items())
