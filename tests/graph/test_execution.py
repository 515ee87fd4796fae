"""Converted networks under torch.compile and both kinds of activation checkpointing."""

import copy

import networks
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dbconvert.errors import Refused
from dbconvert.graph import inject as injecting
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import eject, inject
from dbconvert.graph.proof import prove
from dbconvert.graph.tape import tensors
from dbconvert.graph.untouched import no_fast_paths

WIDTH = 8


class Running(nn.Module):
    """A converted network with random modulation, its condition and active layers as arguments."""

    def __init__(self, name):
        super().__init__()
        self.model, self.inputs = networks.build(name)
        self.anatomy = analyse(self.model, self.inputs)
        self.run = inject(self.model, self.anatomy, blocks=2, width=WIDTH, start="original")
        for parameter in self.model.dbconvert.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)

    def forward(self, condition, active=None):
        self.run.condition, self.run.active = condition, active
        return tensors(self.model(**self.inputs))[0][1]


@pytest.mark.parametrize("name", ["vit", "encoder_post", "hf_llama", "functional_norm"])
def test_compiles_without_a_graph_break(name):
    torch._dynamo.reset()
    with no_fast_paths(), torch.no_grad():
        network = Running(name)
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        for active in (None, range(1, 3)):
            for _ in range(2):
                condition = torch.randn(2, WIDTH)
                assert torch.allclose(compiled(condition, active), network(condition, active), atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["encoder_pre", "encoder_post"])
def test_torchs_fused_layers_leave_no_site_out(name):
    """Their pass for evaluation reads weights past the norms and the gates that are conditioned."""
    torch.manual_seed(0)
    network = Running(name).eval()
    condition = torch.randn(2, WIDTH)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        found = network(condition)
        with no_fast_paths():
            expected = network(condition)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, network(torch.randn(2, WIDTH)), atol=1e-3)
    eject(network.model)
    assert all(layer.activation_relu_or_gelu for layer in network.model.encoder.layers)


def test_the_proof_catches_a_fused_path_past_the_sites(monkeypatch):
    model, inputs = networks.build("encoder_pre")
    anatomy = analyse(model, inputs)
    assert all(check.passed for check in prove(model, anatomy, inputs).proof)
    monkeypatch.setattr(injecting, "unfuse", lambda _: None)
    with pytest.raises(Refused, match="every site reaches the output") as refused:
        prove(model, anatomy, inputs)
    assert "evaluation takes a fused path past them" in str(refused.value)


class TrainsFused(nn.Module):
    """A layer that reads its weights past the modules that hold them, in training only."""

    def __init__(self):
        super().__init__()
        self.norm, self.down = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        if not self.training:
            return x + self.down(self.norm(x))
        normed = F.layer_norm(x, (8,), self.norm.weight, self.norm.bias)
        return x + F.linear(normed, self.down.weight, self.down.bias)


def test_the_proof_catches_a_path_of_training_past_the_sites():
    model = nn.Sequential(nn.Linear(4, 8), TrainsFused(), TrainsFused(), nn.Linear(8, 3))
    inputs = {"input": torch.randn(2, 4)}
    with pytest.raises(Refused, match="every site reaches the output") as refused:
        prove(model, analyse(model, inputs), inputs)
    assert "training (1, 2) takes a path of its own past them" in str(refused.value)


@pytest.mark.parametrize("name", ["vit", "hf_gpt2", "functional_norm"])
def test_layers_compile_one_by_one(name):
    torch._dynamo.reset()
    network = Running(name)
    condition = torch.randn(2, WIDTH)
    with torch.no_grad():
        expected = network(condition, range(1, 3))
        for layer in network.anatomy.layers:
            network.model.get_submodule(layer.path).compile(backend="aot_eager", fullgraph=True)
        assert torch.allclose(network(condition, range(1, 3)), expected, atol=1e-6)
    torch._dynamo.reset()


def enable_checkpointing(model, reentrant):
    """Transformers renamed this between the versions that are supported."""
    options = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["hf_vit", "hf_gpt2", "hf_llama", "hf_bert"])
def test_gradients_under_checkpointing_are_the_same(name, reentrant):
    network = Running(name)
    embedder = nn.Linear(3, WIDTH)

    def gradients(model):
        model.train()
        torch.manual_seed(0)
        model(embedder(torch.ones(2, 3)), range(1, 3)).square().sum().backward()
        found = {
            k: p.grad.clone()
            for k, p in [*model.named_parameters(), *embedder.named_parameters()]
            if p.grad is not None
        }
        model.zero_grad()
        embedder.zero_grad()
        return found

    plain = gradients(network)
    saving = copy.deepcopy(network)
    enable_checkpointing(saving.model, reentrant)
    checkpointed = gradients(saving)
    assert plain.keys() == checkpointed.keys() and "weight" in plain
    assert all(torch.allclose(plain[k], checkpointed[k], atol=1e-6) for k in plain)


def test_checkpointing_in_the_users_own_forward():
    class Saving(networks.Net):
        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return self.head(x.mean(1))

    torch.manual_seed(0)
    plain, inputs = networks.Net(lambda: networks.Block(dropout=0.0)), {"x": networks.features()}
    saving = Saving(lambda: networks.Block(dropout=0.0))
    saving.load_state_dict(plain.state_dict())
    found = []
    for model in (plain, saving):
        run = inject(model, analyse(model, inputs), blocks=1, width=WIDTH, start="original")
        torch.manual_seed(1)
        for parameter in model.dbconvert.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        run.condition = condition = torch.ones(2, WIDTH, requires_grad=True)
        model(**inputs).square().sum().backward()
        found.append([condition.grad, *(p.grad for p in model.dbconvert.modulation.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
