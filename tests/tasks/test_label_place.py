"""Where a noisy label enters and what the head reads: found by trying each network, or as asked for, or refused."""

import re

import networks
import pytest
import torch

from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.errors import UsageError
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import PREFIX, inject
from dbconvert.tasks.base import Corruption
from dbconvert.tasks.causal_lm import CausalLM
from dbconvert.tasks.classification import Classification
from dbconvert.tasks.label_place import in_words

pytestmark = pytest.mark.usefixtures("one_thread")
CONDITION = 8


class TwoTokens(networks.ViT):
    """The second one comes from the picture."""

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1)[:, :17] + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 1])


class Repeated(networks.ViT):
    """Takes one class token for the whole batch."""

    def forward(self, x):
        self_cls = self.cls.repeat(len(x), 1, 1)
        x = torch.cat([self_cls, self.patch(x).flatten(2).transpose(1, 2)], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


OWN = {
    "perceptron": lambda: (networks.Net(networks.PreNormMLP), {"x": torch.randn(2, 5, 8)}),
    "all_depths": lambda: (networks.AllDepths(networks.Block), {"x": torch.randn(2, 5, 8)}),
    "two_tokens": lambda: (TwoTokens(), {"x": networks.images()}),
    "repeated": lambda: (Repeated(), {"x": networks.images()}),
}


def opened(name):
    torch.manual_seed(0)
    model, inputs = OWN[name]() if name in OWN else networks.build(name)
    return model.eval(), inputs, analyse(model, inputs)


def target_of(name, entry=None, readout=None):
    model, _, anatomy = opened(name)
    return Classification.place(Classification.decide(anatomy), anatomy, model, entry, readout)


@pytest.mark.parametrize(
    ("name", "placement", "readout", "token"),
    [
        ("vit", "token", "token", 0),
        ("hf_vit", "token", "token", 0),
        ("two_tokens", "token", "token", 1),
        ("vit_mean", "append", "pooled", None),
        ("encoder_post_seq_first", "append", "pooled", None),
        ("scaled", "append", "pooled", None),
        ("mixer", "add", "pooled", None),  # as many tokens as its weights have rows
        ("perceptron", "add", "pooled", None),  # tokens never see each other
        ("all_depths", "add", "pooled", None),  # its readout adds streams of all lengths
        ("conv", "add", "pooled", None),
        ("hf_convnext", "add", "pooled", None),
    ],
)
def test_the_analysis_chooses(name, placement, readout, token):
    target = target_of(name)
    assert (target.placement, target.readout, target.token) == (placement, readout, token)
    assert in_words(target)


@pytest.mark.parametrize(
    ("name", "entry", "readout", "why"),
    [
        ("vit_mean", "replace", None, "reads no single token"),
        ("vit_mean", "token", None, "reads no single token"),
        ("two_tokens", "replace", None, r"token 1 is not one parameter of shape \[1, 1, 32\]"),
        ("repeated", "replace", None, "not one parameter"),
        ("perceptron", "append", "token", "in layers.0 tokens do not see each other"),
        ("mixer", "append", None, "layers.0 fails on one token more: "),
        ("perceptron", "append", None, "in layers.0 tokens do not see each other"),
        ("conv", "append", None, r"no positions: it is \[2, 32, 4, 4\]"),
        ("conv", None, "token", "there is neither"),
        ("vit_mean", "add", "token", "there is neither"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(name, entry, readout, why):
    with pytest.raises(UsageError) as caught:
        target_of(name, entry, readout)
    assert re.search(why, f"{caught.value.message} {caught.value.why}")


def test_other_tasks_have_no_choice():
    model, _, anatomy = opened("hf_llama")
    with pytest.raises(UsageError, match="no choice"):
        CausalLM.place(CausalLM.decide(anatomy), anatomy, model, "add", None)


def test_what_cannot_be_tried_is_not_assumed():
    _, _, anatomy = opened("vit_mean")
    target = Classification.decide(anatomy)
    assert Classification.place(target, anatomy, None, None, None).placement == "add"
    with pytest.raises(UsageError, match="has to be tried"):
        Classification.place(target, anatomy, None, "append", None)


def test_trying_leaves_the_network_as_it_was():
    model, inputs, anatomy = opened("vit_mean")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes, out = [type(m) for m in model.modules()], model(**inputs)
    Classification.place(Classification.decide(anatomy), anatomy, model.train(), "append", None)
    assert [type(m) for m in model.modules()] == classes and model.training and not hasattr(model, PREFIX)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.eval()(**inputs), out)


# -- what then happens in a block ---------------------------------------------------------------------------------


def passes(name, entry, readout):
    """A converted network as a function of (inputs, z), with what it is told of sigma random."""
    model, inputs, anatomy = opened(name)
    target = Classification.place(Classification.decide(anatomy), anatomy, model, entry, readout)
    run = inject(model, anatomy, blocks=1, width=CONDITION, start="original")
    task = Classification(anatomy, target)
    task.register(model, blocks=1, width=CONDITION, seed=0)
    generator = torch.Generator().manual_seed(1)
    condition = torch.randn(2, CONDITION, generator=generator)

    def call(z, given=inputs):
        noisy = Corruption(z, torch.full((2,), 0.7), condition, Preconditioning(0.2))
        passage = task.passage(model, 0, given, noisy)
        run.reset()
        passage.steer(run)
        with torch.no_grad():
            out = torch.func.functional_call(model, dict(passage.instead), args=(), kwargs=passage.inputs)
        return out if isinstance(out, torch.Tensor) else out.logits

    return call, inputs, model, task


@pytest.mark.parametrize(
    ("name", "entry", "readout"),
    [
        ("vit", "replace", None),
        ("hf_vit", "replace", "pooled"),
        ("vit", "token", "pooled"),
        ("vit", "append", None),
        ("vit", "append", "pooled"),
        ("vit", "add", None),
        ("vit_mean", "append", "token"),
        ("vit_mean", "append", "pooled"),
        ("encoder_pre_seq_first", "append", None),
        ("conv", "add", None),
        ("conv_post", "add", None),
    ],
)
def test_each_example_is_read_from_its_own_picture_and_label(name, entry, readout):
    call, inputs, _, _ = passes(name, entry, readout)
    z = torch.randn(2, networks.WIDTH)
    out = call(z)
    other = z.clone()
    other[0] += 1
    assert out.shape == (2, 5) and torch.isfinite(out).all()
    moved = (call(other) - out).abs().amax(1)
    assert moved[0] > 1e-4 and moved[1] == 0
    turned = {k: torch.cat([v[:1], -v[1:]]) for k, v in inputs.items()}
    moved = (call(z, turned) - out).abs().amax(1)
    assert moved[0] == 0 and moved[1] > 1e-4


def test_replacing_leaves_nothing_of_the_class_token_but_its_position():
    call, _, model, _ = passes("vit", "replace", None)
    z = torch.randn(2, networks.WIDTH)
    out = call(z)
    with torch.no_grad():
        model.cls.mul_(3)
        assert torch.equal(call(z), out)
        model.positions[:, 0] *= 3
    assert not torch.allclose(call(z), out)


def test_an_appended_token_is_what_the_head_reads():
    """The stream that leaves the layers is that token, at every position."""
    call, _, model, _ = passes("vit_mean", "append", "token")
    seen = []
    model.norm.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    call(torch.randn(2, networks.WIDTH))
    assert seen[0].shape == (2, 17, networks.WIDTH) and torch.equal(seen[0], seen[0][:, :1].expand(-1, 17, -1))


def test_convolutions_get_a_bias_a_channel():
    task = passes("conv", None, None)[3]
    arriving = torch.randn(2, networks.WIDTH)
    stream = torch.randn(2, networks.WIDTH, 4, 4)
    assert torch.equal(task.entry(arriving)(stream), stream + arriving[:, :, None, None])


def test_pooled_reading_leaves_the_class_token_out():
    call, _, model, _ = passes("vit", "token", "pooled")
    seen = []
    model.norm.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    model.blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    call(torch.randn(2, networks.WIDTH))
    assert torch.allclose(seen[1][:, 0], seen[0][:, 1:].mean(1), atol=1e-5)
