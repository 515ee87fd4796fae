"""The tape writes down what happened, whatever the network does."""

import networks
import pytest
import torch
from cascades import in_blocks
from torch import nn

from dbconvert.graph.analysis import analyse
from dbconvert.graph.proof import prove
from dbconvert.graph.spine import find_spines
from dbconvert.graph.tape import describe, record
from dbconvert.tasks.classification import Classification


def functions(recording):
    return [getattr(n.target, "__name__", "") for n in recording.graph.nodes if n.op == "call_function"]


def test_modules_without_children_are_leaves():
    model, inputs = networks.build("vit")
    recording = record(model, (), inputs)
    leaves = {n.target for n in recording.graph.nodes if n.op == "call_module"}
    assert "blocks.0.norm1" in leaves and "blocks.0" not in leaves
    call = recording.calls_of("blocks.1")[0]
    assert call.scope == ("",) and call.form == "tensor"
    assert call.inputs[0][1] is recording.calls_of("blocks.0")[0].outputs[0][1]


def test_output_equals_the_networks_own():
    model, inputs = networks.build("hf_llama")
    with torch.no_grad():
        before = model(**inputs).logits
        record(model, (), inputs)
        assert torch.equal(model(**inputs).logits, before)


def test_works_on_the_meta_device():
    with torch.device("meta"):
        model = networks.ViT()
        recording = record(model.eval(), (), {"x": torch.empty(2, 3, 16, 16)})
    chain = find_spines(recording, model).chains()[0]
    assert len(chain) == 2 * networks.DEPTH


def test_works_on_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model = networks.GPT().eval()
        recording = record(model, (), {"ids": torch.zeros(2, 12, dtype=torch.long)})
    assert len(find_spines(recording, model).chains()[0]) == 2 * networks.DEPTH


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        y += x
        z = y.mT.mT
        z[:, 0] = 0
        if z.sum() > 1e9:
            z = z * 2
        return {"out": z, "pair": (y, None)}


def test_in_place_writes_properties_and_decisions_are_seen():
    recording = record(Odd().eval(), (), {"x": torch.randn(2, 3, 4)})
    names = functions(recording)
    assert {"__iadd__", "add_"} & set(names) and "__setitem__" in names and names.count("getattr") == 2
    assert len(recording.decisions) == 1 and "test_tape.py" in describe(recording.decisions[0])
    assert [path for path, _ in recording.outputs] == [("out",), ("pair", 0)]


def test_a_sum_is_residual_only_if_one_term_dominates():
    class Sums(nn.Module):
        def forward(self, x, y):
            a = x + y  # neither comes from the other
            b = a + a.sin()  # residual
            return b + (b.cos() + b.tanh())  # residual with two branches

    model = Sums()
    spines = find_spines(record(model, (), {"x": torch.randn(2, 3), "y": torch.randn(2, 3)}), model)
    chain = spines.chains()[0]
    assert [len(add.branches) for add in chain] == [1, 2]


@pytest.mark.parametrize("name", ["conv", "conv_post", "conv_stem"])
def test_traces_in_train_mode_leave_the_statistics_of_batch_norms(name):
    """Of the analysis, its proof and the choice of the label's place: buffers and modes are what they were."""
    model, inputs = networks.build(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.num_batches_tracked += 3
    model.layers.train()
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    traced = []
    count = model.layers[0].register_forward_pre_hook(lambda module, _: traced.append(module.training))
    anatomy = prove(model, analyse(model, inputs), inputs)
    assert True in traced and len(before) > 3
    assert [module.training for module in model.modules()] == modes
    in_blocks(model, inputs, anatomy, Classification)
    count.remove()
    after = dict(model.named_buffers())
    assert all(torch.equal(after[key], before[key]) for key in before)
