"""The masked_lm task: what it accepts, what a hidden token becomes, what its losses weigh, who sees whom."""

from dataclasses import replace

import networks
import pytest
import torch

from dbconvert.data.examples import IGNORED
from dbconvert.data.sequences import DOCUMENTS
from dbconvert.engine.convert import hearings
from dbconvert.engine.listening import CONTEXT
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.noise import fit_noise
from dbconvert.errors import DBConvertError, Refused
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import inject
from dbconvert.graph.oracle import is_causal
from dbconvert.plan import NoiseRule, Plan
from dbconvert.tasks.masked_lm import MaskedLM
from dbconvert.tasks.registry import choose_task

NAMES = ["hf_bert", "gpt", "hf_llama"]
WIDTH = 8


def anatomy_of(name):
    model, inputs = networks.build(name)
    anatomy = analyse(model, inputs)
    return model, replace(anatomy, causal=is_causal(model, anatomy))


def converted(name, blocks=2, schedule="linear", power=None, context="raw"):
    """A converted network with loud conditioning, so that whatever reaches it shows."""
    torch.manual_seed(0)
    model, anatomy = anatomy_of(name)
    rule = NoiseRule(rule="mask", schedule=schedule, power=power)
    task = MaskedLM(anatomy, MaskedLM.learn(model, anatomy, MaskedLM.decide(anatomy)), rule)
    run = inject(model, anatomy, blocks=blocks, width=WIDTH, start="original")
    task.register(model, blocks=blocks, width=WIDTH, seed=0)
    cut = tuple((b * 4 // blocks, (b + 1) * 4 // blocks - 1) for b in range(blocks))
    plan = Plan(
        schema_version=1, versions={}, source=None, anatomy=anatomy, blocks=cut, start="original",
        condition_width=WIDTH, task="masked_lm", target=task.target, noise=rule,
        preview=fit_noise(rule, blocks, None, None, ""), weights="", pretrained=False, files={}, shapes={},
        context=context,
    )  # fmt: skip
    if context != "raw":
        model.dbconvert.add_module(CONTEXT, hearings(plan))
    for parameter in model.dbconvert.parameters():
        parameter.data.normal_(std=0.3)
    return BlockwiseNetwork(model, run, task, plan, tuple(range(blocks)), "shared").eval()


def given(network, tokens):
    return {network.task.anatomy.embedding.argument: tokens}


@torch.no_grad()
def scores(network, tokens, hidden, t=0.5, block=0, **more):
    return network.denoise(block, {**given(network, tokens), **more}, hidden, torch.full((len(tokens),), t))


def some_hidden():
    hidden = torch.zeros(2, networks.LENGTH, dtype=torch.bool)
    hidden[0, [2, 5]] = hidden[1, [0, 11]] = True
    return hidden


@pytest.fixture(params=NAMES)
def network(request):
    return converted(request.param)


# -- which networks ---------------------------------------------------------------------------------------------


def test_bidirectional_networks_are_taken_and_causal_ones_on_request():
    for name, task in (("hf_bert", "masked_lm"), ("gpt", "causal_lm"), ("hf_llama", "causal_lm")):
        anatomy = anatomy_of(name)[1]
        assert choose_task(anatomy, None).name == task
        assert choose_task(anatomy, "masked_lm") is MaskedLM


def test_networks_without_tokens_or_a_language_head_are_refused():
    assert "no table of embeddings" in MaskedLM.refusal(anatomy_of("vit")[1])
    anatomy = anatomy_of("hf_bert")[1]
    assert "no language head" in MaskedLM.refusal(replace(anatomy, head=None))
    assert "not every position" in MaskedLM.refusal(replace(anatomy, head=replace(anatomy.head, pooled=True)))
    assert "apart" in MaskedLM.refusal(replace(anatomy, head=replace(anatomy.head, outputs=7)))


def test_a_causal_mask_that_cannot_be_removed_is_a_refusal():
    from graph.test_sight import ByHand

    model = networks.GPT(ByHand)
    anatomy = analyse(model, {"ids": networks.tokens()})
    anatomy = replace(anatomy, causal=is_causal(model, anatomy))
    with pytest.raises(Refused, match="do not see the later ones"):
        MaskedLM.learn(model, anatomy, MaskedLM.decide(anatomy))


# -- a forward pass ---------------------------------------------------------------------------------------------


def test_hidden_tokens_leave_no_trace_and_visible_ones_reach_every_position(network):
    tokens, hidden = networks.tokens(), some_hidden()
    before = scores(network, tokens, hidden)
    other = (tokens + 1) % networks.VOCABULARY
    assert torch.equal(scores(network, torch.where(hidden, other, tokens), hidden), before)
    for place in (1, 10):
        changed = tokens.clone()
        changed[:, place] = other[:, place]
        moved = (scores(network, changed, hidden) - before).abs().amax(-1)
        assert bool((moved > 1e-6).all())


def test_a_hidden_token_is_the_blocks_own_vector(network):
    """Moving block 1's vector changes what block 1 says where something is hidden, and nothing else."""
    tokens, hidden = networks.tokens(), some_hidden()
    hidden[1] = False
    mask = network.model.dbconvert.get_parameter("mask.1.weight")
    before = [scores(network, tokens, hidden, block=b) for b in (0, 1)]
    with torch.no_grad():
        mask.neg_()
    after = [scores(network, tokens, hidden, block=b) for b in (0, 1)]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1][1], after[1][1])
    assert not torch.allclose(before[1][0], after[1][0])


def test_time_reaches_the_network(network):
    tokens, hidden = networks.tokens(), some_hidden()
    assert not torch.allclose(scores(network, tokens, hidden, 0.2), scores(network, tokens, hidden, 0.8), atol=1e-4)


def test_documents_do_not_see_each_other(network):
    tokens, hidden = networks.tokens(), some_hidden()
    documents = (torch.arange(networks.LENGTH) // 6).expand(2, -1)
    before = scores(network, tokens, hidden, **{DOCUMENTS: documents})
    tokens = tokens.clone()
    tokens[:, 7] = (tokens[:, 7] + 1) % networks.VOCABULARY
    moved = (scores(network, tokens, hidden, **{DOCUMENTS: documents}) - before).abs().amax(-1) > 1e-6
    assert not moved[:, :6].any() and moved[:, 6:].all()


def test_documents_that_no_mask_keeps_apart_are_an_error():
    network = converted("hf_bert")
    network.task.target = replace(network.task.target, apart=False)
    with pytest.raises(DBConvertError, match="keeps documents or padding apart"):
        scores(network, networks.tokens(), some_hidden(), **{DOCUMENTS: torch.zeros(2, networks.LENGTH)})


# -- corruption and losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "power"), [("linear", None), ("cosine", None), ("polynomial", 2.0)])
def test_as_many_tokens_are_hidden_as_the_schedule_says(schedule, power):
    task = converted("gpt", schedule=schedule, power=power).task
    labels = torch.zeros(4, 20_000, dtype=torch.long)
    labels[3] = IGNORED
    t = torch.tensor([0.1, 0.5, 1.0, 0.5])
    eps = task.draw({"ids": labels}, generator=torch.Generator().manual_seed(0))
    hidden = task.corrupt(None, labels, t, eps)
    expected = task.masking.masked(t[:3]).float()
    assert torch.allclose(hidden[:3].float().mean(-1), expected, atol=0.02) and not hidden[3].any()


def test_losses_are_those_of_hidden_tokens_times_the_weight(network):
    tokens, t = networks.tokens(), torch.tensor([0.25, 0.5])
    eps = network.task.draw(given(network, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = network(0, given(network, tokens), tokens, t, eps)
        hidden = eps < t[:, None]
        said = network.denoise(0, given(network, tokens), hidden, t).log_softmax(-1)
    plain = -said.gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(losses, plain * hidden / t[:, None], rtol=1e-5)


def test_an_untold_network_is_one_without_conditioning():
    network = converted("gpt")
    tokens, hidden = networks.tokens(), some_hidden()
    with torch.no_grad():
        runs = [network.untold(given(network, tokens), hidden, torch.full((2,), t), None) for t in (0.2, 0.8)]
    assert torch.equal(*runs)


def test_padding_does_not_count():
    task = converted("gpt").task
    labels = torch.tensor([[1, 2, IGNORED]])
    assert task.counted(labels).tolist() == [[1, 1, 0]]
    assert float(task.losses(torch.zeros(1, 3, 5), labels)[0, 2]) == 0


def test_what_has_no_noisy_target_says_so():
    task = converted("gpt").task
    with pytest.raises(DBConvertError, match="masked_lm has no table of targets"):
        task.table(None)
