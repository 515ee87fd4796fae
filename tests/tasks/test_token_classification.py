"""The token_classification task: what it accepts, where z enters, what counts, and training as the sampler has it."""

from functools import cache

import networks
import pytest
import taggers
import torch
from tasks.test_cascade import Entered, off_by
from torch import nn

from dbconvert.data.examples import IGNORED
from dbconvert.diffusion.sampling import levels
from dbconvert.engine.cascade import Cascade, approach
from dbconvert.engine.infer import sample
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.errors import Refused, UsageError
from dbconvert.graph.analysis import analyse
from dbconvert.recipe import TrainOptions
from dbconvert.tasks.registry import accepting, choose_task
from dbconvert.tasks.token_classification import ASKED, TokenClassification

NAMES = list(taggers.ROWS)
CONTEXTS = ["features", "estimate"]
N, S = 3, networks.LENGTH


@cache
def built(name="tagger", context="raw"):
    return taggers.tagger(name, context)


def network_of(name="tagger", context="raw"):
    network, intervals = built(name, context)
    network.zero_grad()
    return network.eval(), intervals


def given(network, examples=N):
    generator = torch.Generator().manual_seed(4)
    (told,) = network.plan.anatomy.inputs
    if told.dtype == "float32":
        return {told.name: torch.randn(examples, *told.shape[1:], generator=generator)}
    return {told.name: torch.randint(3, networks.VOCABULARY, (examples, S), generator=generator)}


def labels_of(examples=N, *, some=False, name="tagger"):
    shape = (examples, S, taggers.LABELS) if name == "several" else (examples, S)
    labels = torch.randint(0, taggers.CLASSES, shape, generator=torch.Generator().manual_seed(5))
    if some:
        labels[:, ::3] = IGNORED
    return labels


# -- which networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_networks_with_a_label_a_position_are_accepted(name):
    anatomy = analyse(*taggers.build(name))
    assert TokenClassification.refusal(anatomy) is None
    unasked = [] if name == "vectors" else [TokenClassification]
    assert accepting(anatomy) == unasked and choose_task(anatomy, "token_classification") is TokenClassification


@pytest.mark.parametrize(("name", "task"), [("gpt", "causal_lm"), ("hf_llama", "causal_lm"), ("vit", "classification")])
def test_other_networks_stay_what_they_are(name, task):
    assert [each.name for each in accepting(analyse(*networks.build(name)))] == [task]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit", "the head reads one vector an example, not every position"),
        ("conv", "the head reads one vector an example, not every position"),
    ],
)
def test_networks_without_are_refused(name, message):
    with pytest.raises(UsageError, match=f"task token_classification does not fit this network: {message}"):
        choose_task(analyse(*networks.build(name)), "token_classification")


def test_a_head_of_other_width_is_refused():
    model = taggers.Tagger()
    model.norm = nn.Sequential(nn.LayerNorm(networks.WIDTH), nn.Linear(networks.WIDTH, 16))
    model.head = nn.Linear(16, taggers.CLASSES)
    with pytest.raises(UsageError, match="the head reads 16 features, the stream has 32"):
        choose_task(analyse(model.eval(), {"ids": networks.tokens()}), "token_classification")


def test_positions_of_the_stream_that_the_head_does_not_read_are_refused():
    model = taggers.Tagger(extra=True).eval()
    anatomy = analyse(model, {"ids": networks.tokens()})
    with pytest.raises(Refused, match=r"reads features \[2, 12, 32\], and the stream's positions are \[2, 13, 32\]"):
        TokenClassification.learn(model, anatomy, TokenClassification.decide(anatomy))


# -- where z enters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_z_is_as_loud_as_the_stream_at_every_level(name):
    network, intervals = network_of(name)
    inputs, labels, task = given(network), labels_of(name=name), network.task
    clean = task.clean(network.model, labels).detach()
    for block, level in enumerate((intervals.boundaries[-1], 0.6, intervals.boundaries[0])):
        streams = []
        for z in (torch.zeros_like(clean), clean + level * torch.randn(clean.shape)):
            with Entered(network) as entered, torch.no_grad():
                network.denoise(block, inputs, z, torch.full((N,), level))
            streams.append(entered.seen[0][1])
        before, after = streams
        channel = network.plan.anatomy.axes.channel
        loud = (after - before).square().mean(channel).sqrt() / before.square().mean(channel).sqrt()
        assert 0.8 < float(loud.mean()) < 1.2 and float(loud.min()) > 0.3 and float(loud.max()) < 2


@torch.no_grad()
def denoised(network, inputs, z, level=0.5, block=1):
    return network.denoise(block, inputs, z, torch.full((len(z),), level))


@pytest.mark.parametrize("name", ["tagger", "hf_bert", "channels_first"])
def test_every_position_meets_its_own_z_and_others_see_it(name):
    network, _ = network_of(name)
    inputs = given(network)
    z = torch.randn(network.task.target_shape(inputs), generator=torch.Generator().manual_seed(1))
    before, other = denoised(network, inputs, z), z.clone()
    other[0, 4] *= -1
    moved = (denoised(network, inputs, other) - before).abs().amax(-1)
    assert before.shape == (N, S, taggers.CLASSES) and not moved[1:].any()
    assert moved[0].argmax() == 4 and (moved[0, 3] > 1e-3) and (moved[0, 5] > 1e-3)


def test_the_target_is_the_expected_embedding():
    network, _ = network_of()
    table = network.task.table(network.model)
    scores = torch.full((1, 2, taggers.CLASSES), -50.0)
    scores[0, 0, 3], scores[0, 1, [0, 1]] = 50, 50
    expected = network.task.denoised(network.model, scores)
    assert torch.allclose(expected[0], torch.stack([table[3], table[:2].mean(0)]), atol=1e-6)
    assert torch.allclose(table.norm(dim=-1), torch.ones(taggers.CLASSES), atol=1e-6)
    assert torch.equal(network.task.clean(network.model, torch.tensor([[2, IGNORED]]))[0, 0], table[2])


def test_several_labels_are_one_sum():
    """y of one position, its estimate where the network is sure, and what is told of it: at unit scale."""
    network, _ = network_of("several")
    task, model = network.task, network.model
    assert (task.target.labels, task.target.classes) == (taggers.LABELS, taggers.CLASSES)
    table = task.table(model)
    assert table.shape == (taggers.LABELS, taggers.CLASSES, networks.WIDTH)
    labels = labels_of(name="several")
    y = task.clean(model, labels).detach()
    assert torch.allclose(y[1, 2], sum(table[i, labels[1, 2, i]] for i in range(taggers.LABELS)), atol=1e-6)
    sure = 50.0 * torch.nn.functional.one_hot(labels, taggers.CLASSES)
    assert torch.allclose(task.denoised(model, sure), y, atol=1e-5) and task.correct(sure, labels).all()
    blank = task.denoised(model, torch.zeros_like(sure))
    assert torch.allclose(task.told(model, blank, y), torch.zeros_like(y), atol=1e-5)
    assert 0.7 < task.told(model, y, y).square().mean().sqrt().item() < 1.2
    assert task.losses(sure, labels).shape == labels.shape and task.losses(sure, labels).max() < 1e-3


@pytest.mark.parametrize("some", [False, True])
def test_losses_of_several_labels_reach_their_block(some):
    network, _ = network_of("several")
    inputs, labels = network.task.arranged(given(network), labels_of(some=some, name="several"))
    assert (ASKED in inputs) is some and network.task.counted(labels).shape == labels.shape
    for sigma in (torch.full((N,), 0.5), torch.full((N, S), 0.5)):
        losses = network(1, inputs, labels, sigma, network.task.draw(inputs))
        assert losses.shape == labels.shape and (losses[labels == IGNORED] == 0).all()
        assert (losses[labels != IGNORED] > 0).all()


@pytest.mark.parametrize(
    ("task", "message"),
    [("causal_lm", "the head tells 3 times 5 tokens apart, the table has 61"), ("masked_lm", "the head tells 3 times")],
)
def test_several_labels_are_no_tokens(task, message):
    with pytest.raises(UsageError, match=message):
        choose_task(analyse(*taggers.build("several")), task)


def test_several_labels_of_an_example_are_refused():
    class Several(type(networks.build("vit")[0])):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).unflatten(-1, (5, -1))

    model, inputs = networks.build("vit")
    model.__class__ = Several
    with pytest.raises(UsageError, match="the head tells 5 labels an example"):
        choose_task(analyse(model, inputs), "classification")


# -- positions without a label ----------------------------------------------------------------------------------


def test_positions_without_a_label_have_no_z():
    """Whatever would be there: noise in training, what the sampler made of it in prediction."""
    network, _ = network_of()
    inputs, labels = network.task.arranged(given(network), labels_of(some=True))
    assert torch.equal(inputs[ASKED], labels != IGNORED)
    z = torch.randn(network.task.target_shape(inputs))
    other = torch.where(inputs[ASKED][..., None], z, torch.randn_like(z))
    assert torch.equal(denoised(network, inputs, z), denoised(network, inputs, other))
    zeros = torch.where(inputs[ASKED][..., None], z, torch.zeros_like(z))
    plain = {name: value for name, value in inputs.items() if name != ASKED}
    assert torch.equal(denoised(network, inputs, z), denoised(network, plain, zeros))
    assert not torch.allclose(denoised(network, inputs, z), denoised(network, plain, z), atol=1e-3)


def test_labels_everywhere_need_no_word():
    network, _ = network_of()
    inputs = given(network)
    assert network.task.arranged(inputs, labels_of())[0] is inputs


def test_only_labels_count():
    task = network_of()[0].task
    output = torch.zeros(2, 3, taggers.CLASSES)
    output[0, :, 1] = output[1, :, 2] = 9
    labels = torch.tensor([[1, IGNORED, 1], [2, 0, IGNORED]])
    assert task.counted(labels).tolist() == [[1, 0, 1], [1, 1, 0]]
    losses = task.losses(output, labels)
    assert losses.shape == labels.shape and losses[0, 1] == losses[1, 2] == 0
    assert losses[1, 1] == pytest.approx(9, abs=0.01) and float(losses[0, 0]) < 0.01
    assert task.mean(task.correct(output, labels), labels) == pytest.approx(3 / 4)
    assert task.figures(output, labels) == {"accuracy_examples": 0.5}


@pytest.mark.parametrize("some", [False, True])
def test_a_baseline_is_the_network_itself(some):
    network, _ = network_of()
    inputs, labels = network.task.arranged(given(network), labels_of(some=some))
    plain = network.plan.anatomy.inputs[0].name
    with torch.no_grad():
        losses = network(None, inputs, labels, torch.zeros(N), None, layers=range(4))
        network.run.reset()
        scores = network.model(inputs[plain])
    assert torch.equal(losses, network.task.losses(scores, labels))


# -- training gives what sampling gives -------------------------------------------------------------------------


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("context", ["raw", *CONTEXTS])
@pytest.mark.parametrize("name", ["tagger", "channels_first", "several", "hf_llama"])
def test_training_on_policy_meets_what_sampling_meets(name, context, some):
    """To the bit, at every level of the sampler."""
    network, intervals = network_of(name, context)
    inputs, labels = network.task.arranged(given(network), labels_of(some=some, name=name))
    with Entered(network) as sampled:
        list(sample(network, intervals, inputs))
    assert [b for b, _ in sampled.seen] == [0, 1, 2, 2]
    eps, own = network.task.draw(inputs), torch.ones(N, dtype=torch.bool)
    for i, (block, met) in enumerate(sampled.seen):
        sigma = torch.full((N,), levels(intervals)[i])
        with Entered(network) as trained:
            network(block, inputs, labels, sigma, eps, before=Cascade(intervals, own))
        assert trained.seen[-1][0] == block and torch.equal(trained.seen[-1][1], met)


@pytest.mark.parametrize("context", ["raw", *CONTEXTS])
def test_a_mixed_batch_is_two_batches(context):
    network, intervals = network_of(context=context)
    inputs, labels = network.task.arranged(given(network), labels_of(some=True))
    eps, own = network.task.draw(inputs), torch.tensor([True, False, True])

    def losses(own):
        torch.manual_seed(0)
        sigma, _ = approach(network, intervals, 1, torch.full((N,), 0.5), TrainOptions(z="on-policy"))
        with torch.no_grad():
            return network(1, inputs, labels, sigma, eps, before=Cascade(intervals, own))

    mixed, on, off = losses(own), losses(torch.ones(N).bool()), losses(torch.zeros(N).bool())
    assert torch.allclose(mixed, torch.where(own[:, None], on, off), atol=1e-4)
    assert not torch.allclose(on, off, atol=1e-2)


# -- noise ------------------------------------------------------------------------------------------------------


def test_no_two_levels_of_a_cascade_give_the_target_away(monkeypatch):
    """With one eps for two levels a weighted difference is y itself; here none is nearer than the lower level's z."""
    seen, denoise = [], BlockwiseNetwork.denoise

    def spied(self, block, inputs, z, sigma, *args, **kwargs):
        seen.append((z, sigma))
        return denoise(self, block, inputs, z, sigma, *args, **kwargs)

    network, intervals = network_of(context="features")
    inputs, labels = given(network, 300), labels_of(300)
    y = network.task.clean(network.model, labels).detach()
    monkeypatch.setattr(BlockwiseNetwork, "denoise", spied)
    with torch.no_grad():
        network(2, inputs, labels, torch.full((300,), 0.3), network.task.draw(inputs), before=Cascade(intervals))
    (z0, s0), (z1, s1), (z2, s2) = seen
    assert float(s0[0]) == pytest.approx(intervals.owned(0)[1]) and float(s1[0]) == pytest.approx(intervals.owned(1)[1])
    for (high, s_high), (low, s_low) in (((z1, s1), (z2, s2)), ((z0, s0), (z1, s1)), ((z0, s0), (z2, s2))):
        assert off_by(high, y) == pytest.approx(float(s_high[0]), rel=0.02)
        for share in torch.linspace(-4, 4, 81):
            assert off_by(low + share * (low - high), y) > 0.98 * float(s_low[0])
        weight = float(s_low[0] / (s_high[0] - s_low[0]))
        shared = y + (low - y) * float(s_high[0] / s_low[0])
        assert off_by(low + weight * (low - shared), y) < 1e-5  # what the test would see of a shared eps


# -- what is trained --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("own", [None, torch.ones(N).bool()])
def test_gradients_stay_inside_the_block(context, own):
    network, intervals = network_of(context=context)
    inputs, labels = network.task.arranged(given(network), labels_of(some=True))
    eps, cascade = network.task.draw(inputs), Cascade(intervals, own)
    losses = network(2, inputs, labels, torch.full((N,), 0.3), eps, before=cascade)
    losses.sum().backward()
    owners = {network.owner(name) for name, p in network.model.named_parameters() if p.grad is not None}
    assert owners == {2, None}
    assert network.conditioning.get_parameter("context.2.linear.weight").grad.any()
