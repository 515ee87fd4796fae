"""The recurrent-depth task: what it accepts, that nothing leaks, how often layers run, and the truncated baseline."""

import sys
from pathlib import Path
from types import SimpleNamespace

import loops
import networks
import pytest
import torch
from loops import Looped, RandomState, recurrent_network
from torch.nn import functional as F

from dbconvert.data.examples import IGNORED
from dbconvert.data.sequences import DOCUMENTS
from dbconvert.engine.bound import Bound
from dbconvert.engine.decide import decide_blocks, decide_target
from dbconvert.engine.generate import Decoding, Writer
from dbconvert.engine.infer import sample
from dbconvert.engine.opening import Example, Opened
from dbconvert.engine.recur import recurrent_rows
from dbconvert.errors import DBConvertError, Refused, UsageError
from dbconvert.graph.analysis import analyse
from dbconvert.plan import SourceRef
from dbconvert.recipe import SplitOptions
from dbconvert.tasks.recurrent import Recurrent
from dbconvert.tasks.registry import accepting, choose_task

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
TOKENS = networks.tokens()
FORMS = ("concat", "add", "none")


def noise(*shape, seed=0):
    return torch.randn(*shape, networks.WIDTH, generator=torch.Generator().manual_seed(seed))


def rotary():
    """The example, made small: its prelude calls the function that takes the state, too."""
    from huginn import Huginn

    class Small(Huginn):
        def forward(self, ids):
            return super().forward(ids)

    model = Small(vocabulary=61, depths=(1, 2, 1), width=networks.WIDTH, heads=4, iterations=4)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


# -- who -----------------------------------------------------------------------------------------------------------


def test_a_looped_causal_network_gets_this_task_only():
    anatomy = analyse(Looped().eval(), {"ids": TOKENS})
    assert accepting(anatomy) == [Recurrent]
    with pytest.raises(UsageError, match="run 4 times with the same weights"):
        choose_task(anatomy, "causal_lm")
    with pytest.raises(UsageError, match="its layers run once"):
        choose_task(analyse(*networks.build("gpt")), "recurrent")


def test_networks_that_see_both_ways_are_refused():
    from dataclasses import replace

    for model, argument in ((Looped(causal=False).eval(), "ids"), (albert(), "input_ids")):
        anatomy = replace(analyse(model, {argument: TOKENS}), causal=False)
        with pytest.raises(UsageError, match=r"positions see later ones|embeddings are 16 wide"):
            choose_task(anatomy, "recurrent")
        with pytest.raises(Refused, match="cannot be told apart"):
            decide_blocks(anatomy, SplitOptions(), choose_task(anatomy, None))


def albert():
    import transformers

    sizes = {"hidden_size": 32, "embedding_size": 16, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(vocab_size=61, num_hidden_layers=3, **sizes)).eval()


@pytest.mark.parametrize("options", [{"blocks": 2}, {"layers": (1, 1)}, {"layers_per_block": 1}])
def test_one_block_only(options):
    anatomy = analyse(Looped().eval(), {"ids": TOKENS})
    assert decide_blocks(anatomy, SplitOptions(), Recurrent) == ((0, 1),)
    with pytest.raises(UsageError, match="2 blocks were asked for") as error:
        decide_blocks(anatomy, SplitOptions(**options), Recurrent)
    assert "one block serves them all" in error.value.why


def test_a_small_twin_does_not_tell_where_the_state_is():
    """Its prelude may be shorter, and calls of functions are counted."""
    model = Looped().eval()
    anatomy = analyse(model, {"ids": TOKENS})
    ref = SourceRef("model_file", "build_model", "", (), "")
    empty = Looped().to("meta")
    opened = Opened(SimpleNamespace(ref=ref), empty, {"ids": TOKENS}, None, 0, anatomy, Example(model, anatomy))
    with pytest.raises(Refused, match="has to try it itself") as error:
        decide_target(opened, Recurrent, SplitOptions())
    assert "--prove" in error.value.hint


# -- one pass ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [*(lambda form=form: Looped(form) for form in FORMS), loops.InSubmodule, RandomState])
def test_every_layer_runs_once(build, training):
    network, _ = recurrent_network(build())
    network.train(training)
    calls = []
    blocks = [m for m in network.model.modules() if isinstance(m, networks.Block)]
    for block in blocks:
        block.register_forward_hook(lambda module, *_: calls.append(module))
    losses = network(0, {"ids": TOKENS}, TOKENS, torch.ones(2), noise(*TOKENS.shape))
    assert len(blocks) == 4 and sorted(map(id, calls)) == sorted(map(id, blocks))
    losses.sum().backward()
    assert all(p.grad is not None for name, p in network.model.named_parameters() if "core" in name)


@pytest.mark.parametrize("form", FORMS)
def test_later_tokens_and_their_noise_change_nothing(form):
    """Of outputs before position k: token k + 1 is the target at k, so its noisy embedding is part of state k."""
    network, _ = recurrent_network(Looped(form))
    k, sigma = 5, torch.tensor([0.5, 2.0])
    task, eps = network.task, noise(*TOKENS.shape)
    before = network.denoise(0, {"ids": TOKENS}, task.corrupt(network.model, TOKENS, sigma, eps), sigma)
    tokens, other = TOKENS.clone(), eps.clone()
    tokens[:, k + 1 :] = (tokens[:, k + 1 :] + 1) % networks.VOCABULARY
    other[:, k:] = noise(*TOKENS.shape, seed=1)[:, k:]
    after = network.denoise(0, {"ids": tokens}, task.corrupt(network.model, tokens, sigma, other), sigma)
    assert torch.allclose(after[:, :k], before[:, :k], atol=1e-5)
    assert not torch.allclose(after[:, k], before[:, k], atol=1e-3)


def test_the_target_is_the_token_to_come():
    network, _ = recurrent_network(Looped())
    task, table = network.task, network.task.table(network.model)
    labels = torch.tensor([[3, 7, 9, IGNORED]])
    clean = task.corrupt(network.model, labels, torch.zeros(1), torch.randn(1, 4, networks.WIDTH))
    assert torch.allclose(clean[0, :2], table[[7, 9]], atol=1e-6)
    assert task.counted(labels).tolist() == [[0, 1, 1, 0]]
    eps, sigma = noise(*TOKENS.shape), torch.tensor([0.3, 0.9])
    losses = network(0, {"ids": TOKENS}, TOKENS, sigma, eps)
    z = sigma[:, None, None] * eps
    z[:, :-1] += table[TOKENS[:, 1:]]
    output = network.denoise(0, {"ids": TOKENS}, z, sigma)
    by_hand = F.cross_entropy(output[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none")
    assert torch.allclose(losses[:, 1:].flatten(), by_hand, atol=1e-5)
    assert torch.equal(task.placed(output)[:, 1:], output[:, :-1])


def test_the_bound_measures_every_token_against_its_own_target():
    network, intervals = recurrent_network(Looped())
    bound, task = Bound(network, intervals, 1, 0), network.task
    z, sigma = noise(*TOKENS.shape), torch.tensor([0.4, 1.1])
    found = bound.errors(0, {"ids": TOKENS}, TOKENS, z, sigma, torch.Generator())
    estimate = task.denoised(network.model, network.denoise(0, {"ids": TOKENS}, z, sigma))
    by_hand = (task.clean(network.model, TOKENS)[:, 1:] - estimate[:, :-1]).square().sum((1, 2))
    assert torch.allclose(found.float(), by_hand, rtol=1e-4)


def test_the_pass_by_hand():
    """Prelude, adapter on c_in z, the conditioned core, c_skip z + c_out F over sigma_data, coda, head."""
    model = Looped()
    network, _ = recurrent_network(model)
    with torch.no_grad():
        for parameter in network.conditioning.parameters():
            parameter.zero_()  # modulation 0 and gate 1: the core is the original's
    sd, scale, sigma = network.sigma_data, network.task.loop.scale, 0.7
    z = noise(*TOKENS.shape)
    found = network.denoise(0, {"ids": TOKENS}, z, torch.full((2,), sigma))
    network.run.reset()
    root = (sigma**2 + sd**2) ** 0.5
    given = model.prelude(model.tokens(TOKENS))
    state = model.one_round(z / root * scale, given, 0)
    state = (sd**2 / root**2 * z + sigma * sd / root * state) / sd
    assert torch.allclose(found, model.head(model.norm(model.coda(state))), atol=1e-5)


def test_levels_of_single_positions():
    network, _ = recurrent_network(Looped())
    z, levels = noise(*TOKENS.shape), torch.linspace(0.3, 3, TOKENS.shape[1]).expand(2, -1)
    apart = network.denoise(0, {"ids": TOKENS}, z, levels)
    first = network.denoise(0, {"ids": TOKENS}, z, levels[:, 0])
    assert torch.allclose(apart[:, 0], first[:, 0], atol=1e-5) and not torch.allclose(apart[:, 1], first[:, 1])


def test_documents_are_not_kept_apart():
    network, _ = recurrent_network(Looped())
    inputs = {"ids": TOKENS, DOCUMENTS: torch.zeros_like(TOKENS)}
    with pytest.raises(DBConvertError, match="documents cannot be kept apart"):
        network.denoise(0, inputs, noise(*TOKENS.shape), torch.ones(2))
    with pytest.raises(DBConvertError, match="documents cannot be kept apart"):
        network.plain(inputs)


# -- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [*(lambda form=form: Looped(form) for form in FORMS), rotary])
def test_a_kept_prelude_changes_nothing(build):
    network, intervals = recurrent_network(build())
    calls = []
    prelude = network.model.prelude
    (prelude[0] if isinstance(prelude, torch.nn.ModuleList) else prelude).norm1.register_forward_hook(
        lambda *_: calls.append(1)
    )
    outputs = list(sample(network, intervals, {"ids": TOKENS}, begin=noise(*TOKENS.shape)))
    assert len(outputs) == 4 and len(calls) == 1  # as many evaluations as the network has rounds
    first = network.denoise(
        0, {"ids": TOKENS}, noise(*TOKENS.shape) * intervals.boundaries[-1], torch.full((2,), intervals.boundaries[-1])
    )
    assert len(calls) == 2 and torch.equal(first, outputs[0])
    network.prelude_kept = torch.no_grad
    again = list(sample(network, intervals, {"ids": TOKENS}, begin=noise(*TOKENS.shape)))
    assert len(calls) == 6 and all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


def test_generation_is_evaluation_at_the_last_position():
    network, intervals = recurrent_network(Looped())
    for decoding in (Decoding(), Decoding(temperature=1.0, steps=3)):
        writer = Writer(network, intervals, decoding, torch.Generator().manual_seed(3))
        start = TOKENS[:1, :4]
        written = list(map(int, recurrent_rows(writer, start, 3)))
        assert len(written) == 3
        eps = torch.zeros(1, 4, networks.WIDTH)
        if decoding.temperature:
            eps = torch.randn(eps.shape, generator=torch.Generator().manual_seed(3))
        scores = list(sample(network, intervals, {"ids": start}, steps=decoding.steps, begin=eps))[-1][0, -1]
        if not decoding.temperature:
            assert written[0] == int(scores.argmax())
        again = Writer(network, intervals, decoding, torch.Generator().manual_seed(3))
        assert list(map(int, recurrent_rows(again, start, 3))) == written


# -- the original loop, truncated ----------------------------------------------------------------------------------


def gradients(network, backpropagate, seed=0):
    network.train()
    network.zero_grad()
    network.backpropagate = backpropagate
    torch.manual_seed(seed)
    losses = network(None, {"ids": TOKENS}, TOKENS, torch.zeros(2), None)
    losses.sum().backward()
    return {n: p.grad.clone() for n, p in network.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("back", [1, 3, 4])
def test_truncated_gradients(form, back):
    """Those of a loop by hand that detaches its state; with all rounds those of the whole loop."""
    model = Looped(form)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    network, _ = recurrent_network(model)
    found = gradients(network, back)

    network.zero_grad()
    network.run.reset()
    given = model.prelude(model.tokens(TOKENS))
    state = model.begin(given)
    for turn in range(4):
        if turn == 4 - back:
            state = state if back == 4 else state.detach()
        state = model.one_round(state, given, turn)
    scores = model.head(model.norm(model.coda(state)))
    F.cross_entropy(scores[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum").backward()
    by_hand = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == by_hand.keys()
    assert all(torch.allclose(found[name], gradient, atol=1e-4) for name, gradient in by_hand.items())
    if back == 4:
        whole = gradients(network, None)
        assert all(torch.equal(found[name], gradient) for name, gradient in whole.items())


def test_truncation_is_of_training_only_and_leaves_gradients_on():
    network, _ = recurrent_network(Looped())
    network.backpropagate = 1
    network.eval()
    assert network.plain_loop().blind == 0
    network.train()
    assert network.plain_loop().blind == 3
    with torch.no_grad():
        assert network.plain_loop().blind == 0
        assert not network.plain({"ids": TOKENS}).requires_grad
    with pytest.raises(RuntimeError):
        network.model_output({"ids": TOKENS.float()})  # fails in the stem
    network.model.coda.mlp[0].weight.data = torch.randn(3, 3)
    with pytest.raises(RuntimeError):
        network.model_output({"ids": TOKENS})
    assert torch.is_grad_enabled()


def test_activations_are_of_the_last_rounds():
    from dbconvert.graph.account import saved_bytes

    network, _ = recurrent_network(Looped(rounds=6))
    network.train()

    def kept(back):
        network.backpropagate = back
        loss = lambda: network(None, {"ids": TOKENS}, TOKENS, torch.zeros(2), None).sum()  # noqa: E731
        return saved_bytes(loss, network.parameters())

    one, two, four, six = kept(1), kept(2), kept(4), kept(6)
    assert one < two < four < six and abs((four - two) - 2 * (two - one)) < 0.1 * (four - two)
