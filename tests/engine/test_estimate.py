"""estimate: its figures against what autograd really keeps and what training really holds, and what it chooses."""

import json
from dataclasses import replace

import commands
import networks
import pytest
import torch
import torch.nn.functional as F
import transformers
from engine.conftest import QUICK, write_model

import dbconvert
from dbconvert.engine import opening
from dbconvert.engine.ablation import evidence
from dbconvert.engine.estimate import as_one_block
from dbconvert.engine.estimate_records import Request, Setting
from dbconvert.engine.layer_kinds import layer_kinds
from dbconvert.engine.meter import Meter
from dbconvert.engine.optimizers import state_size
from dbconvert.engine.outline import outline
from dbconvert.engine.rehearsal import Case
from dbconvert.errors import DBConvertError, Refused, UsageError
from dbconvert.events import silent
from dbconvert.graph.account import saved_bytes
from dbconvert.graph.analysis import analyse
from dbconvert.recipe import SplitOptions
from dbconvert.shipped import shipped
from dbconvert.sources.resolve import open_source

AWAY, CHECKPOINTED = Setting("away", False), Setting("away", True)
BATCH, TOKENS = 6, 20
TEXT_FAMILIES = {
    "llama": (transformers.LlamaConfig, "LlamaForCausalLM", {"num_key_value_heads": 2}),
    "bert": (transformers.BertConfig, "BertForMaskedLM", {}),
    "mixtral": (transformers.MixtralConfig, "MixtralForCausalLM", {"num_local_experts": 4, "num_key_value_heads": 2}),
}


def folder(config, path):
    config.save_pretrained(path)
    return str(path)


def row(found, blocks):
    return next(row for row in found.rows if row.blocks == blocks)


def text_source(name, path):
    config, architecture, options = TEXT_FAMILIES[name]
    return folder(config(**networks.TEXT, **options, use_cache=False, architectures=[architecture]), path)


def really_kept(source, layers, inputs):
    """Bytes that autograd keeps on real tensors in one training pass of the task; None runs the whole network plain."""
    opened = opening.open_and_analyse(source, stack=None, weights=None, seed=0, report=silent)
    network = as_one_block(opened).train()
    tokens, sigma = inputs["input_ids"], torch.ones(BATCH)
    if layers is not None:
        network.plan = replace(network.plan, blocks=((layers.start, layers.stop - 1),))
    eps = None if layers is None else network.task.draw(inputs)

    def loss():
        return network(None if layers is None else 0, inputs, tokens, sigma, eps).mean()

    return saved_bytes(loss, network.parameters())


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_activations_of_text_networks_are_what_autograd_keeps(name, tmp_path):
    source = text_source(name, tmp_path / "m")
    found = dbconvert.estimate(source, request=Request(case=Case(BATCH, TOKENS)))
    inputs = {"input_ids": torch.randint(0, networks.VOCABULARY, (BATCH, TOKENS))}
    for blocks, layers in ((None, None), (2, range(0, 2)), (4, range(3, 4))):
        setting = Setting("resident", False) if blocks is None else AWAY
        assert row(found, blocks).holdings[setting].activations == pytest.approx(
            really_kept(source, layers, inputs), rel=0.01
        )


@pytest.mark.parametrize("name", ["written by hand", "convnext"])
def test_activations_of_classifiers_are_what_training_keeps(name, tmp_path, package):
    """Of the package's own network, measured by `train --dry-run` on real tensors."""
    if name == "convnext":
        source = folder(networks.convnext_config(), tmp_path / "m")
        target = dbconvert.split(source, out="p", options=SplitOptions(blocks=2, start="original")).package
        batch, blocks = 4, 2
    else:
        source, target, batch, blocks = str(package / "model" / "model.py"), package, 32, 3
    overrides = ["train.steps=1", f"train.batch={batch}", "data.source=null"]
    planned = outline(str(target), overrides=overrides)
    found = dbconvert.estimate(source, request=Request(case=Case(batch)))
    unit, held = planned.memory.largest, row(found, blocks).holdings[AWAY]
    assert held.activations == pytest.approx(unit.activations, rel=0.01)
    assert held.parameters + held.gradients + held.optimizer == unit.state
    whole = planned.controls["end-to-end"].largest
    assert found.rows[0].holdings[Setting("resident", False)].activations == pytest.approx(whole.activations, rel=0.01)
    assert found.rows[0].holdings[Setting("resident", False)].optimizer == whole.state // 2
    again = outline(str(target), overrides=[*overrides, "train.checkpointing=true"])
    estimated = row(found, blocks).holdings[CHECKPOINTED].activations
    assert estimated == pytest.approx(again.memory.largest.activations, rel=0.01)
    estimated = found.rows[0].holdings[Setting("resident", True)].activations
    assert estimated == pytest.approx(again.controls["end-to-end"].largest.activations, rel=0.01)


def test_checkpointing_is_what_transformers_own_keeps(tmp_path):
    """Its re-entrant form saves the inputs of layers where hooks see them."""
    source = text_source("llama", tmp_path / "m")
    model = open_source(source).build().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    ids = torch.randint(0, networks.VOCABULARY, (BATCH, TOKENS))
    embedded = model.get_input_embeddings()(ids)

    def loss():
        scores = model(inputs_embeds=embedded).logits.flatten(0, -2)
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))

    opened = opening.open_and_analyse(source, stack=None, weights=None, seed=0, report=lambda _: None)
    from dbconvert.engine.estimate import as_one_block
    from dbconvert.engine.rehearsal import Rehearsal

    with Rehearsal(as_one_block(opened), opened.inputs, Case(BATCH, TOKENS)) as rehearsal:
        kept = rehearsal.kept(None, checkpointing=True)
        meter = Meter(rehearsal, (0, 0, 0, 0))
        assert kept < meter.end_to_end(True) < meter.end_to_end(False)
    assert kept == pytest.approx(saved_bytes(loss, model.parameters()), rel=0.1)


def test_large_networks_give_the_same_estimate(tmp_path, monkeypatch):
    source = folder(networks.gpt2_config(), tmp_path / "m")
    real = dbconvert.estimate(source, request=Request(case=Case(3)))
    assert real.request.case.length == 64  # what its positions reach
    monkeypatch.setattr(opening, "LARGE", 0)
    found = dbconvert.estimate(source, request=Request(case=Case(3)))
    assert found.rows == real.rows


@pytest.mark.parametrize("shares", [False, True])
def test_layers_that_add_up_are_summed_and_others_measured(shares):
    """Two kinds of layers; where the second kind shares a tensor of 7 bytes among its layers, nothing adds up."""
    kinds = (0, 1, 1, 0, 1, 1)

    class Rehearsed:
        asked = 0

        def kept(self, layers, checkpointing=False, remakes=False):
            self.asked += 1
            of_second_kind = sum(kinds[i] for i in layers)
            return 100 + 10 * len(layers) + 5 * of_second_kind + 7 * bool(shares and of_second_kind)

    rehearsed = Rehearsed()
    meter = Meter(rehearsed, kinds)
    assert meter.additive != shares
    assert meter.kept(1, 3, False) == rehearsed.kept(range(1, 4)) == 140 + 7 * shares
    before = rehearsed.asked
    assert meter.kept(2, 4, False) == 140 + 7 * shares and rehearsed.asked == before + shares


def test_kinds_of_layers(tmp_path):
    options = dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16)  # noqa: C408
    config = transformers.DeepseekV3Config(
        **networks.TEXT, **options, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=1, use_cache=False,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    assert layer_kinds(model, analyse(model, {"input_ids": networks.tokens()})) == (0, 1, 1, 1)


def test_what_is_chosen(model_file):
    def ask(memory, **options):
        return dbconvert.estimate(str(model_file), request=Request(memory=memory, case=Case(16), **options))

    everything = ask(None)
    assert everything.best is None and not everything.advice and len(everything.rows) == 6
    totals = {r.blocks: r.holdings[CHECKPOINTED].total for r in everything.rows[1:]}
    exactly = ask(totals[3])
    assert exactly.smallest[CHECKPOINTED] == 3 and exactly.best == (3, CHECKPOINTED)
    assert any("CIFAR-100" in line and "59.30" in line for line in exactly.evidence)
    assert ask(totals[3] - 1).best[0] > 3
    none = ask(1000)
    assert none.best is None and [a.fits for a in none.advice] == [False] * 3
    assert none.advice[0].total == min(totals.values()) and none.advice[1].total < none.advice[0].total
    assert [r.layers for r in none.rows] == [5, 5, 3, 2, 2, 1]
    assert [r.evaluations for r in none.rows] == [5, 10, 7, 6, 6, 6]


def test_optimiser_state():
    assert [state_size(10_240, name) for name in ("adamw", "sgd", "adamw8bit")] == [
        81_920,
        40_960,
        2 * (10_240 + 160 + 1024),
    ]
    assert state_size(10_000, "adamw8bit") == 80_000  # not in whole groups
    assert state_size(100, "adamw8bit") == 800


def test_bf16_keeps_less(model_file):
    full, half = (
        row(dbconvert.estimate(str(model_file), request=Request(case=Case(16, precision=p))), 1).holdings[AWAY]
        for p in ("fp32", "bf16")
    )
    assert half.activations < full.activations and half.parameters == full.parameters


IN_BACKWARD = ["optimizer.in_backward=true", "train.clip=null"]
REMADE, TRUE = ["train.recompute_modulation=true"], ["train.precision=bf16-true"]


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (IN_BACKWARD, {"in_backward": True}),
        (REMADE, {"recompute_modulation": True}),
        (TRUE, {"case": Case(32, precision="bf16-true")}),
    ],
    ids=["in backward", "modulation recomputed", "bf16-true"],
)
def test_options_of_training_change_the_estimate_as_they_change_training(overrides, options, package):
    source, data = str(package / "model" / "model.py"), ["train.steps=1", "train.batch=32", "data.source=null"]
    planned = outline(str(package), overrides=[*data, *overrides])
    plain, found = (dbconvert.estimate(source, request=Request(**{"case": Case(32), **o})) for o in ({}, options))
    unit, held = planned.memory.largest, row(found, 3).holdings[AWAY]
    assert held.total < row(plain, 3).holdings[AWAY].total
    assert held.parameters + held.gradients + held.optimizer == unit.state
    assert held.activations == pytest.approx(unit.activations, rel=0.01)
    whole = planned.controls["end-to-end"].largest
    assert found.rows[0].holdings[Setting("resident", False)].total == pytest.approx(
        whole.state + whole.activations, rel=0.01
    )
    if "recompute_modulation" in options:
        assert row(found, 3).holdings[CHECKPOINTED] == row(plain, 3).holdings[CHECKPOINTED]


def test_a_run_holds_what_is_estimated_with_all_options(package, tmp_path):
    asked = [*QUICK, *IN_BACKWARD, *REMADE, *TRUE, "train.steps=1", "data.validation=null"]
    with torch.compiler.set_stance("force_eager"):
        run = dbconvert.train(str(package), overrides=asked, out=str(tmp_path / "run"))
    source, case = str(package / "model" / "model.py"), Case(32, precision="bf16-true")
    request = Request(case=case, in_backward=True, recompute_modulation=True)
    held = row(dbconvert.estimate(source, request=request), 3).holdings[Setting("resident", False)]
    measured = json.loads((run.folder / "memory.json").read_text())
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    holds = [line["holds"] for line in lines if "holds" in line][-1]
    assert held.activations == pytest.approx(max(unit["activations"] for unit in measured["units"]), rel=0.01)
    assert held.parameters + held.gradients + held.optimizer == measured["resident_state"]
    assert (held.parameters, held.gradients) == (holds["parameters"] + holds["spare"], holds["gradients"])
    assert held.optimizer == pytest.approx(holds["optimizer"], rel=0.01)  # which counts its steps too


def test_the_evidence_is_the_papers():
    assert "FID 9.90 with 2 blocks, end-to-end 12.09" in evidence(2)[0]
    assert "tried no 5 blocks" in evidence(5)[0] and "with 4 blocks" in evidence(5)[1]
    assert len(evidence(1)) == 1


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(2, length=8), "--length is for sequences"),
        (Case(2, size=24), "fails at this size"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, case, message):
    source = folder(networks.vit_config(), tmp_path / "m")
    with pytest.raises((UsageError, DBConvertError), match=message):
        dbconvert.estimate(source, request=Request(case=case))


def test_positions_beyond_a_table_are_noticed(tmp_path):
    source = folder(networks.gpt2_config(), tmp_path / "m")
    with pytest.raises(DBConvertError) as caught:
        dbconvert.estimate(source, request=Request(case=Case(2, length=65)))
    assert "looked up in a table of 64" in caught.value.why


def test_a_looped_network_is_refused(tmp_path):
    config = transformers.AlbertConfig(**networks.TEXT, embedding_size=16, architectures=["AlbertForMaskedLM"])
    with pytest.raises(Refused, match="called 4 times"):
        dbconvert.estimate(folder(config, tmp_path / "m"))


def test_the_command(tmp_path):
    model = write_model(tmp_path / "m")
    found = commands.as_json("estimate", model, "--memory", "100MB", "--batch", 4, "--json")
    assert [r["blocks"] for r in found["rows"]] == [None, 1, 2, 3, 4, 5] and found["best"]["blocks"] == 1
    text = commands.dbconvert("estimate", model, "--memory", "1kB").stdout
    assert "nothing fits into 1.0 kB" in text and "not counted" in text and "end-to-end" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--memory", "lots"], 2, "--memory lots is not an amount of memory"),
        (["--memory", "24"], 2, "e.g. --memory 24GB"),
        (["--memory", "0GB"], 2, "is nothing"),
        (["--batch", "0"], 2, "batch = 0"),
        (["--precision", "fp8"], 2, "precision = 'fp8'"),
        (["--optimizer", "lion"], 2, "optimizer = 'lion'"),
        (["--precision", "bf16-true", "--optimizer", "sgd"], 2, "sgd rounds to the nearest"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, code, message):
    from dbconvert.cli.main import guarded

    assert guarded(["estimate", str(write_model(tmp_path / "m")), *arguments], debug=False) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_refused_network(tmp_path):
    (tmp_path / "bad.py").write_text("import torch\n\ndef build_model():\n    return torch.nn.Linear(3, 3)\n")
    done = commands.dbconvert("estimate", "bad.py", "--memory", "1GB", "--json", code=1)
    assert json.loads(done.stdout)["verdict"] == "refused" and "error" in done.stderr


def test_from_how_many_blocks_text_saves_activations():
    """Clean and noisy tokens are twice as many, so that few blocks keep more than end-to-end training."""
    found = dbconvert.estimate(str(shipped("examples/gpt.py")), request=Request(case=Case(batch=2, length=32)))
    kept = {row.blocks: row.holdings[Setting("resident", False)].activations for row in found.rows}
    told = next(note for note in found.notes if "fewer activations" in note)
    least = int(told.split(" block")[0].split()[-1])
    assert least > 1 and kept[least] < kept[None] <= kept[least - 1]
