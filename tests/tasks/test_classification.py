"""The classification task: what it accepts, where the noisy label enters, what the head reads."""

import networks
import pytest
import torch
from cascades import blockwise
from torch import nn
from torch.nn import functional as F

from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import PREFIX
from dbconvert.tasks.base import Corruption, leaf
from dbconvert.tasks.classification import Classification
from dbconvert.tasks.discrete import denoise_before_head
from dbconvert.tasks.registry import choose_task


def added():
    """A network that has nothing but what conversion added."""
    model = nn.Module()
    model.add_module(PREFIX, nn.Module())
    return model


def task_for(name, entry=None, readout=None):
    model, inputs = networks.build(name)
    anatomy = analyse(model, inputs)
    target = Classification.place(Classification.decide(anatomy), anatomy, model, entry, readout)
    return Classification(anatomy, target), model, inputs


def corruption(width, sigma=0.7):
    torch.manual_seed(0)
    return Corruption(torch.randn(2, width), torch.full((2,), sigma), torch.randn(2, 8), Preconditioning(0.2))


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
def test_a_class_token_is_where_the_label_enters(name):
    task, _, _ = task_for(name)
    assert (task.target.placement, task.target.token, task.target.classes) == ("token", 0, 5)
    noisy = corruption(networks.WIDTH)
    stream = torch.randn(2, 17, networks.WIDTH)
    changed = task.entry(task.arriving(noisy))(stream)
    c_in = 1 / (0.7**2 + 0.2**2) ** 0.5
    assert torch.equal(changed[:, 1:], stream[:, 1:])
    assert torch.allclose(changed[:, 0], stream[:, 0] + c_in * noisy.z, atol=1e-6)


def test_vectors_are_classified_too():
    """A stream of rank 2: one vector an example, no positions."""
    model = networks.whole_sequential()
    anatomy = analyse(model, {"input": torch.randn(2, 8)})
    task = choose_task(anatomy, None)
    assert task is Classification and anatomy.head.pooled and anatomy.stream_shape == (2, networks.WIDTH)
    noisy = corruption(networks.WIDTH)
    acting = task(anatomy, task.decide(anatomy))
    change = acting.entry(acting.arriving(noisy))
    assert torch.allclose(change(torch.zeros(2, networks.WIDTH)), noisy.z / (0.7**2 + 0.2**2) ** 0.5, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_mean", "encoder_pre", "encoder_post_seq_first"])
def test_without_one_it_is_added_everywhere_if_asked(name):
    task, _, _ = task_for(name, entry="add")
    assert (task.target.placement, task.target.readout) == ("add", "pooled")
    noisy = corruption(networks.WIDTH)
    shape = (5, 2, networks.WIDTH) if name.endswith("seq_first") else (2, 5, networks.WIDTH)
    change = task.entry(task.arriving(noisy))(torch.zeros(shape))
    by_example = change.transpose(0, 1) if name.endswith("seq_first") else change
    assert torch.allclose(by_example, by_example[:, :1].expand_as(by_example))
    assert torch.allclose(by_example[:, 0].var(), torch.tensor(1 / (0.7**2 + 0.2**2)) * noisy.z.var(), rtol=1e-4)


def test_the_head_reads_the_preconditioned_features():
    task, _, _ = task_for("vit")
    model = added()
    task.register(model, blocks=2, width=8, seed=0)
    noisy, features = corruption(networks.WIDTH), torch.randn(2, networks.WIDTH)
    scaling, sigma = noisy.scaling, noisy.sigma[:, None]
    expected = (scaling.c_skip(sigma) * noisy.z + scaling.c_out(sigma) * features) / scaling.sigma_data
    assert torch.allclose(denoise_before_head(model, 1, noisy, noisy.condition)(features), expected, atol=1e-6)


def test_the_table_is_normalised_and_mixes_into_the_estimate():
    task, _, _ = task_for("vit")
    model = added()
    task.register(model, blocks=2, width=8, seed=0)
    model.dbconvert.target.weight.data *= torch.rand(5, 1) + 1
    table = task.table(model)
    assert torch.allclose(table.norm(dim=-1), torch.ones(5))
    logits = torch.randn(2, 5)
    assert torch.allclose(task.denoised(model, logits), logits.softmax(-1) @ table)
    certain = torch.tensor([[99.0, 0, 0, 0, 0]])
    assert torch.allclose(task.denoised(model, certain), table[:1])
    assert torch.equal(task.clean(model, torch.tensor([3])), table[3:4])


def test_losses_and_averages():
    task, _, _ = task_for("vit")
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    assert torch.allclose(task.losses(logits, labels).mean(), F.cross_entropy(logits, labels))
    assert task.correct(F.one_hot(labels, 5).float(), labels).all()
    assert torch.allclose(task.probabilities(logits), logits.softmax(-1))


def test_another_output_than_the_analysed_one_is_told():
    """As of networks that give an auxiliary result in train mode."""
    scores, aux = torch.zeros(2, 5), torch.zeros(())
    assert leaf(scores, ()) is scores and leaf({"logits": (aux, scores)}, ("logits", 1)) is scores
    with pytest.raises(DBConvertError, match="returns a tuple, not a tensor: something else than when it was analysed"):
        leaf((scores, aux), ())
    with pytest.raises(DBConvertError, match=r"returns a dict with no tensor at logits\.1"):
        leaf({"logits": scores[0, 0]}, ("logits", 1))


@pytest.mark.parametrize("name", ["gpt", "hf_gpt2", "hf_llama", "hf_bert"])
def test_language_models_are_none(name):
    anatomy = analyse(*networks.build(name))
    with pytest.raises(UsageError, match="reads every position"):
        choose_task(anatomy, "classification")


def test_unknown_task():
    with pytest.raises(UsageError, match="no task telepathy"):
        choose_task(analyse(*networks.build("vit")), "telepathy")


class Ending(nn.Module):
    def __init__(self, ending):
        super().__init__()
        self.body, self.ending = networks.whole_sequential(), ending

    def forward(self, input):
        return self.ending(self.body(input))


@pytest.mark.parametrize(
    ("ending", "change"),
    [
        (nn.LogSoftmax(dim=-1), "log_softmax"),
        (lambda scores: F.log_softmax(scores, dim=1), "log_softmax"),
        (nn.Softmax(dim=1), "softmax"),
        (lambda scores: scores.softmax(-1), "softmax"),
    ],
)
def test_a_softmax_at_the_end_is_part_of_the_loss(ending, change):
    """Classifiers that were written for nll_loss, or that tell probabilities, lose what their scores would."""
    labels, sigma, eps = torch.tensor([1, 4, 0]), torch.tensor([0.3, 0.7, 2.0]), torch.randn(3, networks.WIDTH)
    given = {"input": torch.randn(3, 8)}

    def losses(ending):
        torch.manual_seed(0)
        network, _ = blockwise(Ending(ending), given, Classification)
        plain = network.task.losses(network.plain(given), labels)
        features = torch.randn(3, networks.WIDTH, generator=torch.Generator().manual_seed(0))
        read = network.read(1, features).softmax(-1)
        return network.plan.anatomy.head.after, plain, network(1, given, labels, sigma, eps), read

    expected, found = losses(nn.Identity()), losses(ending)
    assert expected[0] == () and [one.name for one in found[0]] == [change]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("ending", [nn.Softmax(dim=0), lambda scores: scores.softmax(-1) * 2])
def test_other_endings_are_no_scores(ending):
    assert Classification.refusal(analyse(Ending(ending), {"input": torch.randn(3, 8)})) is not None


class SequenceFirst(networks.Encoder):
    """The stream is [S, N, C]; `pick` takes one position of it, or of a view."""

    def __init__(self, pick):
        super().__init__(True, False)
        self.pick = pick

    def forward(self, x):
        return self.head(self.pick(self.encoder(self.stem(x).transpose(0, 1))))


@pytest.mark.parametrize(
    ("pick", "token"),
    [
        (lambda x: x[0], 0),
        (lambda x: x[-1, ...], -1),
        (lambda x: x.select(0, 2), 2),
        (lambda x: x.transpose(0, 1)[:, 1], 1),
        (lambda x: x.transpose(0, 1)[..., 0, :], 0),
        (lambda x: x[:, 0], None),
        (lambda x: x.mean(0), None),
    ],
)
def test_the_token_that_is_read_is_told_by_its_axis(pick, token):
    """An index of the batch, or of channels, is none of a token."""
    model = SequenceFirst(pick).eval()
    assert analyse(model, {"x": networks.features()}).head.token == token
