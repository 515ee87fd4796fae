"""Masked text from end to end: training, the evidence bound, unmasking, and what is refused."""

import json
import math
from pathlib import Path

import commands
import networks
import pytest
import torch
from tasks.test_masked_lm import NAMES, converted, given

import dbconvert
from dbconvert.diffusion.intervals import Intervals, boundaries
from dbconvert.engine.evidence import Evidence, figures
from dbconvert.engine.generate import Decoding
from dbconvert.engine.load import load
from dbconvert.engine.unmask import unmask
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.plan import NoiseRule

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 60
TINY = "    return Encoder(vocabulary=64, positions=16, depth=3, width=16, heads=2)\n\n\n"
QUICK = ["train.steps=3", "train.batch=8", "log.every=1", "eval.draws=1", "optimizer.lr=3e-3"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe on a tiny encoder and a text file."""
    folder = tmp_path_factory.mktemp("masked")
    source = (EXAMPLES / "encoder.py").read_text()
    start, end = source.index("    return Encoder("), source.index("def example_inputs")
    tiny = source[:start] + TINY + source[end:].replace("2 * 32).view(2, 32) % 128", "2 * 12).view(2, 12) % 64")
    (folder / "model.py").write_text(tiny)
    (folder / "corpus.txt").write_text(TEXT)
    (folder / "recipe.yaml").write_text(
        "source: model.py\ntask: masked_lm\nsplit: {blocks: 3}\n"
        "data: {source: corpus.txt, tokenizer: char, length: 16, cache: cache}\n"
    )
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def run(recipe):
    return dbconvert.train(str(recipe), overrides=QUICK, out=str(recipe.parent / "run"))


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# -- the bound --------------------------------------------------------------------------------------------------


def evidence(network, blocks, draws=1, **more):
    masking = network.task.masking
    return Evidence(network, Intervals(masking, tuple(boundaries(masking, blocks))), draws, 0, **more)


class Everywhere:
    """One network that serves the interval of every block."""

    def __init__(self, network):
        self.network, self.task, self.plan, self.present = network, network.task, network.plan, (0, 1, 2)

    def __call__(self, block, *args, **kwargs):
        return self.network(0, *args, **kwargs)


def batches(network, count=64):
    tokens = torch.randint(0, networks.VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(3))
    return [(given(network, tokens), tokens)]


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", NAMES)
def test_one_network_over_three_intervals_sums_to_its_whole_bound(name, schedule):
    network = converted(name, blocks=1, schedule=schedule)
    whole = evidence(network, 1, 48).measure(batches(network), 1.0)
    parts = evidence(Everywhere(network), 3, 16).measure(batches(network), 1.0)
    assert sum(parts[f"nats_block_{b}"] for b in range(3)) == pytest.approx(parts["nats_per_token"])
    error = math.hypot(whole["nats_per_token_error"], parts["nats_per_token_error"])
    assert abs(whole["nats_per_token"] - parts["nats_per_token"]) < 3 * error < 0.15 * whole["nats_per_token"]


@torch.no_grad()
@pytest.mark.parametrize(("schedule", "power"), [("linear", None), ("cosine", None), ("polynomial", 2.0)])
def test_a_network_that_knows_nothing_needs_the_logarithm_of_the_vocabulary(schedule, power):
    """Exactly: every hidden token costs ln K, whatever the schedule, so that the bound is tight and hides nothing."""
    network = converted("gpt", blocks=3, schedule=schedule, power=power)
    network.model.head.weight.data.zero_()
    found = evidence(network, 3, 64).measure(batches(network, 256), 2.0)
    expected = math.log(networks.VOCABULARY)
    assert abs(found["nats_per_token"] - expected) < 4 * found["nats_per_token_error"] < 0.1 * expected
    assert found["bits_per_character"] == pytest.approx(found["nats_per_token"] / math.log(2) / 2)


def test_the_error_is_that_of_a_mean_over_examples():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 400, 3, generator=generator, dtype=torch.float64) + 5
    found = [figures(row, torch.full((400,), 10.0), [0, 1, 2], 3, 1.0) for row in rows]
    inside = [abs(f["bits_per_character"] - 1.5 / math.log(2)) < 1.96 * f["bits_per_character_error"] for f in found]
    assert sum(inside) / len(inside) == pytest.approx(0.95, abs=0.02)
    assert found[0]["bits_per_character_low"] < found[0]["bits_per_character"] < found[0]["bits_per_character_high"]


def test_examples_of_different_lengths_weigh_by_their_tokens():
    rows, counts = torch.tensor([[8.0], [2.0]]), torch.tensor([4.0, 1.0])
    found = figures(rows, counts, [0], 1, 1.0)
    assert found["nats_per_token"] == 2 and found["nats_per_token_error"] == 0


def test_a_block_alone_tells_its_share_only():
    found = figures(torch.ones(2, 1), torch.ones(2), [1], 3, 1.0)
    assert found == {"nats_block_1": 1.0}


# -- unmasking --------------------------------------------------------------------------------------------------


def intervals_of(network, blocks=2):
    return Intervals(network.task.masking, tuple(boundaries(network.task.masking, blocks)))


def sampled(network, seed=0, steps=8, hidden=None, **more):
    tokens = networks.tokens()
    hidden = torch.ones_like(tokens).bool() if hidden is None else hidden
    generator = torch.Generator().manual_seed(seed)
    return unmask(network, intervals_of(network), tokens, hidden, steps=steps, generator=generator, **more)


@pytest.mark.parametrize("name", NAMES)
def test_unmasking_is_deterministic_and_leaves_what_is_visible(name):
    network = converted(name)
    hidden = torch.zeros(2, networks.LENGTH, dtype=torch.bool)
    hidden[:, 4:] = True
    first = sampled(network, hidden=hidden)
    assert torch.equal(first, sampled(network, hidden=hidden)) and not torch.equal(first, sampled(network, 1))
    assert torch.equal(first[:, :4], networks.tokens()[:, :4])
    assert int(sampled(network, vocabulary=7).max()) < 7


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_each_block_serves_its_own_times_and_all_is_shown(steps, monkeypatch):
    network = converted("hf_bert")
    served = []
    denoise = network.denoise

    def noted(block, inputs, hidden, level, **more):
        served.append((block, float(level[0]), float(hidden.float().mean())))
        return denoise(block, inputs, hidden, level, **more)

    monkeypatch.setattr(network, "denoise", noted)
    sampled(network, steps=steps)
    assert len(served) == steps and served[0][1:] == (1.0, 1.0)
    assert [block for block, t, _ in served] == [int(t <= 0.5 + 1e-6) for _, t, _ in served]
    assert [h for *_, h in served] == sorted((h for *_, h in served), reverse=True)


def test_a_share_of_tokens_is_hidden_as_the_schedule_says(monkeypatch):
    """The chain of steps leaves hidden at t what training hides at t."""
    network = converted("gpt", schedule="cosine")
    tokens = torch.zeros(400, 12, dtype=torch.long)
    shares = []
    denoise = network.denoise
    monkeypatch.setattr(
        network, "denoise", lambda b, i, h, t, **_: shares.append((t[:1], h.float().mean())) or denoise(b, i, h, t)
    )
    generator = torch.Generator().manual_seed(0)
    unmask(network, intervals_of(network), tokens, torch.ones_like(tokens).bool(), steps=6, generator=generator)
    for t, share in shares:
        assert float(share) == pytest.approx(float(network.task.masking.masked(t)), abs=0.03)


def test_samples_follow_the_distribution_that_the_network_tells():
    """A network that says the same everywhere is drawn from in its own proportions."""
    network = converted("gpt")
    head = network.model.head
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    head.bias = torch.nn.Parameter(torch.full((networks.VOCABULARY,), -50.0))
    head.bias.data[:2] = torch.tensor([0.75, 0.25]).log()
    drawn = sampled_many(network)
    assert float((drawn == 0).float().mean()) == pytest.approx(0.75, abs=0.02) and int(drawn.max()) == 1
    assert not sampled_many(network, temperature=0.0).any()


def sampled_many(network, **more):
    tokens = torch.zeros(400, 12, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    return unmask(network, intervals_of(network), tokens, tokens == 0, steps=3, generator=generator, **more)


# -- from end to end --------------------------------------------------------------------------------------------


def test_training_writes_the_bound(run):
    assert {"nats_block_0", "nats_block_2", "bits_per_character", "bits_per_character_low"} <= set(run.metrics)
    assert run.metrics["bits_per_character"] < 8
    assert sum("loss" in line for line in lines(run.folder)) == 9


def test_every_block_s_own_parts_move(run):
    package = run.folder / "package"
    from dbconvert.checkpoint import load_tensors

    for block in range(3):
        before = load_tensors(package / "weights" / f"block-{block}.safetensors")
        after = load_tensors(run.folder / "weights" / f"block-{block}.safetensors")
        for key in (f"dbconvert.mask.{block}.weight", f"dbconvert.embedder.{block}.mlp.0.weight"):
            assert not torch.equal(before[key], after[key]), key


def test_assembled_blocks_evaluate_as_the_run_does_and_generate(run, tmp_path):
    checkpoint = dbconvert.assemble([str(run.folder)], out=str(tmp_path / "m.safetensors"))
    overrides = [f"data.source={run.folder.parent / 'corpus.txt'}", "eval.draws=1"]
    found = dbconvert.evaluate(str(checkpoint), part="validation", overrides=overrides)
    assert found.metrics == pytest.approx(run.metrics, rel=1e-5)
    ask = ["generate", checkpoint, "--prompt", "the ", "--temperature", "1", "--seed", "3"]
    told = commands.dbconvert(*ask).stdout
    again = commands.dbconvert(*ask).stdout
    assert told.startswith("the ") and told == again and len(told.rstrip("\n")) == 16


def test_single_blocks_are_independent_and_come_together(recipe, tmp_path):
    """Nothing passes between them, so that blocks trained alone are those of the joint run."""
    package = tmp_path / "package"
    data = load(str(recipe.parent / "run")).data
    dbconvert.split(str(recipe.parent / "model.py"), out=str(package), task="masked_lm", data=data)
    alone = [*QUICK, "train.periphery=frozen-target"]
    runs = [dbconvert.train(str(package), overrides=alone, block=b, out=str(tmp_path / f"b{b}")) for b in range(3)]
    joint = dbconvert.train(str(package), overrides=alone, out=str(tmp_path / "joint"))
    together = dbconvert.assemble([str(run.folder) for run in runs], out=str(tmp_path / "m.safetensors"))
    overrides = [f"data.source={data.source}", "eval.draws=1"]
    found = dbconvert.evaluate(str(together), part="validation", overrides=overrides).metrics
    assert found == pytest.approx(joint.metrics, rel=1e-5)
    assert set(runs[1].metrics) == {"nats_block_1"}


@pytest.mark.parametrize("method", ["end-to-end", "shallow"])
def test_baselines_see_all_times_without_being_told(recipe, tmp_path, method):
    overrides = [*QUICK, f"train.method={method}"]
    result = dbconvert.train(str(recipe), overrides=overrides, out=str(tmp_path / "run"))
    assert result.metrics["bits_per_character"] < 8 and "nats_block_0" not in result.metrics
    found = dbconvert.evaluate(str(result.folder), part="validation", overrides=["eval.draws=1"])
    assert found.metrics == pytest.approx(result.metrics, rel=1e-5)


def test_padding_is_kept_out_of_sight(recipe, tmp_path):
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": TEXT[i : i + 4 + i % 9]}) for i in range(90)))
    overrides = [*QUICK, f"data.source={tmp_path / 'docs.jsonl'}", "data.pack=false"]
    result = dbconvert.train(str(recipe), overrides=overrides, out=str(tmp_path / "run"))
    assert math.isfinite(result.metrics["bits_per_character"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("noise.rule=edm", "noise `edm` is not for task masked_lm"),
        ("noise.sigma_max=3", "sigma_max belongs to noise `edm`"),
        ("noise.power=2", "schedule linear with power 2"),
        ("noise.per=position", "hidden at one time"),
        ("train.weight=edm", "train.weight=edm"),
        ("split.table=own", "no target table `own`"),
        ("data.tokenizer=byte", "the tokenizer has 256 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe, tmp_path, override, message):
    with pytest.raises((UsageError, DBConvertError), match=message):
        dbconvert.train(str(recipe), overrides=[*QUICK, override], out=str(tmp_path / "run"))


def test_no_tokens_are_no_text(run):
    assert list(dbconvert.generate(str(run.folder), TEXT[:3], tokens=0)) == [""]


def test_a_prompt_that_leaves_no_room_is_refused(run):
    with pytest.raises(UsageError, match="the prompt has 40 tokens, and the network was trained on 16"):
        list(dbconvert.generate(str(run.folder), TEXT[:40]))
    with pytest.raises(UsageError, match="top-k"):
        list(dbconvert.generate(str(run.folder), "the", decoding=Decoding(top_k=3)))


def test_masking_is_only_for_tasks_that_hide(tmp_path):
    with pytest.raises(UsageError, match="noise `mask` is not for task classification"):
        dbconvert.split(str(EXAMPLES / "vit.py"), noise=NoiseRule(rule="mask"), dry_run=True)
