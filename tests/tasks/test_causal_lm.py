"""The autoregressive task: what it accepts, what it counts, and generation with and without a cache."""

from dataclasses import replace

import networks
import pytest
import torch
from language import causal_network
from torch.nn import functional as F
from transformers import masking_utils

from dbconvert.data.examples import IGNORED
from dbconvert.data.sequences import DOCUMENTS
from dbconvert.engine.generate import Decoding, Writer, can_cache
from dbconvert.errors import UsageError
from dbconvert.graph.analysis import analyse
from dbconvert.graph.two_streams import TwoStreams
from dbconvert.tasks.causal_lm import CausalLM
from dbconvert.tasks.registry import choose_task
from tests.acceptance.table import CONVERTED

CACHED = [
    "gpt", "gpt_encoder", "hf_gpt2", "hf_llama", "hf_mistral", "hf_gemma3", "hf_gpt_neox", "hf_opt",
    "hf_falcon", "hf_mixtral",
]  # fmt: skip
UNCACHED = ["gpt_multihead", "hf_bloom", "hf_gptj", "hf_gemma2"]


def start(length=5):
    return torch.randint(0, networks.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))


def writer(name, **decoding):
    network, intervals = causal_network(CONVERTED[name])
    return Writer(network, intervals, Decoding(**decoding), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CACHED)
def test_cached_generation_is_generation(name):
    """Token for token, greedy, for longer than the attention's window; and the scores agree."""
    made = writer(name)
    assert can_cache(made, start(), lambda _: None)
    plain = list(made.tokens(start(), 12, cache=False))
    assert list(made.tokens(start(), 12, cache=True)) == plain and len(set(plain)) > 1


@pytest.mark.parametrize("part", ["embedder", "modulation", "readout"])
def test_what_a_level_tells_is_made_once_for_all_tokens(part):
    made, calls = writer("hf_llama"), []
    for module in made.network.conditioning.get_submodule(part).children():
        module.register_forward_hook(lambda *_: calls.append(1))
    by_token = []
    for _ in made.tokens(start(), 5, cache=True):
        by_token.append(len(calls))
    assert 0 < by_token[0] <= by_token[1] == by_token[-1]


@pytest.mark.parametrize("name", UNCACHED)
def test_attention_by_hand_is_generated_without_a_cache_and_says_so(name):
    made, notes = writer(name), []
    assert not can_cache(made, start(), notes.append)
    assert "without a cache" in notes[0].text
    assert len(list(made.tokens(start(), 3, cache=False))) == 3


def test_one_pass_on_all_positions_is_the_generator_s_at_each():
    """What is trained is what generates: block by block, at any level."""
    made = writer("hf_llama")
    network, tokens = made.network, start(7)
    z = torch.randn(1, 7, networks.WIDTH)
    for block, level in ((0, 2.0), (1, 0.4)):
        sigma = torch.tensor([level])
        together = network.denoise(block, {"input_ids": tokens}, z, sigma)
        for i in range(1, 7):
            alone = made.evaluate(block, tokens[:, :i], z[:, i : i + 1], level, None)
            assert torch.allclose(together[:, i], alone[:, 0], atol=1e-4)


@pytest.mark.parametrize("name", ["hf_llama", "hf_mistral"])
def test_positions_that_come_twice_are_not_read_as_packed_documents(name, monkeypatch):
    """Transformers hides documents from each other where there is no mask and positions start again."""
    network, asked, find = writer(name).network, [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda ids: asked.append((ids, find(ids))) or asked[-1][1]
    )
    tokens, z, sigma = start(6), torch.randn(1, 6, networks.WIDTH), torch.tensor([1.0])
    before = network.denoise(0, {"input_ids": tokens}, z, sigma)
    assert asked and all(ids[0].tolist() == list(range(6)) and found is None for ids, found in asked)
    tokens[0, 2] += 1
    apart = (network.denoise(0, {"input_ids": tokens}, z, sigma) - before).abs().amax((0, 2))
    assert not apart[:3].any() and apart[3:].all()


def test_levels_of_single_positions():
    made = writer("hf_llama")
    tokens, z = start(6), torch.randn(1, 6, networks.WIDTH)
    levels = torch.linspace(0.3, 3, 6)[None]
    together = made.network.denoise(0, {"input_ids": tokens}, z, levels)
    for i in (0, 3, 5):
        same = made.network.denoise(0, {"input_ids": tokens}, z, levels[:, i])
        assert torch.allclose(together[:, i], same[:, i], atol=1e-5)


def test_later_tokens_and_other_documents_change_nothing():
    made = writer("gpt")
    tokens, z, sigma = start(6), torch.randn(1, 6, networks.WIDTH), torch.ones(1)

    def scores(tokens, z, **more):
        return made.network.denoise(0, {"ids": tokens, **more}, z, sigma)

    before = scores(tokens, z)
    changed, other = tokens.clone(), z.clone()
    changed[:, 3] = (changed[:, 3] + 1) % networks.VOCABULARY
    other[:, 3] = 0
    after = scores(changed, other)
    assert torch.allclose(after[:, :3], before[:, :3], atol=1e-6) and not torch.allclose(after[:, 4], before[:, 4])
    apart = {DOCUMENTS: torch.tensor([[0, 0, 0, 0, 1, 1]])}
    assert torch.allclose(scores(changed, other, **apart)[:, 4:], scores(tokens, z, **apart)[:, 4:], atol=1e-6)
    plain, moved = (made.network.plain({"ids": t, **apart}) for t in (tokens, changed))
    assert torch.equal(plain[:, 5:], moved[:, 5:]) and not torch.equal(plain[:, 4], moved[:, 4])


def test_sampling():
    hot, cold = writer("gpt", temperature=1.0), writer("gpt", temperature=1.0, top_k=1)
    scores = torch.randn(1, 1, 9)
    assert torch.equal(hot.filtered(scores), scores) and int(torch.isfinite(cold.filtered(scores)).sum()) == 1
    half = writer("gpt", temperature=0.5, top_p=0.6).filtered(scores)
    kept = torch.isfinite(half)
    share = (2 * scores).softmax(-1)
    assert float(share[kept].sum()) >= 0.6 > float(share[kept].sum() - share[kept].min())
    first, again = (list(writer("gpt", temperature=1.0).tokens(start(), 5, cache=True)) for _ in range(2))
    assert first == again


def test_what_counts():
    anatomy = analyse(*networks.build("hf_llama"))
    task = CausalLM(anatomy, CausalLM.decide(anatomy))
    labels = torch.tensor([[3, 4, 5, IGNORED], [1, 2, 3, 4]])
    assert task.counted(labels).tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]
    output = torch.randn(2, 4, networks.VOCABULARY)
    losses = task.losses(output, labels)
    assert losses[0, 3] == 0 and torch.allclose(losses[1], F.cross_entropy(output[1], labels[1], reduction="none"))
    ahead = task.losses(task.plain(output), labels)
    assert torch.equal(ahead[1, 1:], task.losses(output[1:, :-1], labels[1:, 1:])[0])


@pytest.mark.parametrize("name", ["hf_llama", "hf_gemma2", "hf_cohere", "gpt"])
def test_losses_in_chunks_are_the_losses(name, monkeypatch):
    """The same numbers and gradients, also behind a softcap or a scale, with scores of a few positions at a time."""
    network, _ = causal_network(CONVERTED[name])
    argument = network.plan.anatomy.embedding.argument
    tokens, sigma, eps = start(9).repeat(2, 1), torch.tensor([0.5, 2.0]), torch.randn(2, 9, networks.WIDTH)

    def losses_and_gradients(block, eps):
        network.zero_grad()
        losses = network(block, {argument: tokens}, tokens, sigma, eps)
        losses.sum().backward()
        return losses.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    for block, noise in ((1, eps), (None, None)):
        whole, gradients = losses_and_gradients(block, noise)
        seen = []
        monkeypatch.setattr("dbconvert.engine.chunks.SCORES", 4 * networks.VOCABULARY)
        read = type(network).read

        def counted(self, block, features, read=read, seen=seen):
            seen.append(features.shape[1])
            return read(self, block, features)

        monkeypatch.setattr(type(network), "read", counted)
        losses, found = losses_and_gradients(block, noise)
        monkeypatch.undo()
        assert max(seen) == 4 and torch.allclose(losses, whole, atol=1e-5)
        assert found.keys() == gradients.keys()
        assert all(torch.allclose(found[n], g, atol=1e-4) for n, g in gradients.items())
        if noise is None:
            logits = network.plain({argument: tokens})
            assert torch.allclose(network.task.losses(logits, tokens)[:, 1:], whole[:, 1:], atol=1e-4)


@pytest.mark.parametrize("table", ["own", "fresh"])
def test_tables(table):
    network, _ = causal_network(CONVERTED["hf_llama"], table=table)
    found = network.task.table(network.model)
    assert torch.allclose(found[1:].norm(dim=-1), torch.ones(len(found) - 1), atol=1e-5)  # 0 pads: a row of zeros
    own = F.normalize(network.model.get_submodule("model.embed_tokens").weight, dim=-1)
    assert torch.equal(found, own) == (table == "own")
    labels = torch.tensor([[2, IGNORED]])
    assert torch.equal(network.task.clean(network.model, labels)[0, 0], found[2])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("hf_bert", "positions see later ones"), ("vit", "no table of embeddings")],
)
def test_others_are_refused(name, reason):
    from dataclasses import replace

    anatomy = analyse(*networks.build(name))
    with pytest.raises(UsageError, match=reason):
        choose_task(replace(anatomy, causal=False), "causal_lm")


def test_a_model_without_a_language_head_is_refused():
    import transformers

    model = transformers.LlamaModel(networks.llama_config()).eval()
    with pytest.raises(UsageError, match="no language head"):
        choose_task(analyse(model, {"input_ids": networks.tokens()}), "causal_lm")


@pytest.mark.parametrize("levels", [(3,), (3, 5)], ids=["sequence", "position"])
@pytest.mark.parametrize("halves", [True, False])
def test_what_clean_positions_are_told_is_modulated_once(levels, halves, monkeypatch):
    """Their one constant goes through a layer's linear once, however many positions and examples have it."""
    network, _ = causal_network(CONVERTED["hf_llama"])
    network.task.target = replace(network.task.target, halves=halves)
    for parameter in network.conditioning.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    rows = []
    for modulation in network.conditioning.modulation.values():
        modulation.linear.register_forward_hook(lambda _, given, out: rows.append(out.shape[:-1].numel()))
    tokens = torch.randint(0, networks.VOCABULARY, (3, 5))
    z, sigma = torch.randn(3, 5, networks.WIDTH), torch.rand(levels) + 0.5

    def gradients():
        rows.clear()
        network.zero_grad()
        network.denoise(0, {"input_ids": tokens}, z, sigma).square().sum().backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    once, counted = gradients(), list(rows)
    monkeypatch.setattr(TwoStreams, "leading", lambda _: 0)
    every = gradients()
    assert set(counted) == {1, sigma.numel()} and counted.count(1) == len(network.plan.layers_of(0))
    assert once.keys() == every.keys() and any("clean" in name for name in once)
    for name, gradient in every.items():
        assert torch.allclose(once[name], gradient, atol=1e-5 * float(gradient.abs().max().clamp(min=1))), name
