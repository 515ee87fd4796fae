"""What `eval` says of text that a network writes: repetition, a teacher's perplexity, MAUVE; and what it refuses."""

import json
import math
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import commands
import pytest
import torch
from language import causal_network
from small_text import FOX, write_gpt
from tokenizer_files import save_bpe

import dbconvert
from dbconvert.engine.generate import Decoding, Writer
from dbconvert.engine.load import load
from dbconvert.engine.repeats import distinct_2, repetition
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.recipe import SplitOptions
from dbconvert.sources.readers import Reader, open_reader
from tests.acceptance.table import CONVERTED

FEW = ["eval.draws=0", "eval.sigmas=0", "eval.samples=6"]

# -- repetition -------------------------------------------------------------------------------------------------


def test_different_pairs():
    assert distinct_2(torch.tensor([[1, 2, 1, 2]])) == pytest.approx(2 / 3)
    assert distinct_2(torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1]])) == pytest.approx(1 / 6)
    assert distinct_2(torch.tensor([[1, 2, 3, 4], [2, 1, 4, 3]])) == 1.0


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 4),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 9, 1, 2, 3, 8], 0),
        ([5, 5, 5, 5, 5, 5], 5),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], 5),
    ],
)
def test_tokens_inside_of_what_was_said_before(text, inside):
    assert repetition(torch.tensor([text])) == pytest.approx(inside / len(text))


def test_other_texts_are_not_said_before():
    assert repetition(torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])) == 0


# -- many at once -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cache", [True, False])
def test_rows_are_written_as_they_are_alone(cache):
    network, intervals = causal_network(CONVERTED["hf_llama"])
    writer = Writer(network, intervals, Decoding(), torch.Generator())
    starts = torch.randint(0, network.task.target.classes, (3, 5), generator=torch.Generator().manual_seed(0))
    together = torch.stack(list(writer.rows(starts, 7, cache=cache)), 1)
    alone = [list(writer.tokens(start[None], 7, cache=cache)) for start in starts]
    assert together.tolist() == alone and len({tuple(row) for row in alone}) > 1


# -- from end to end --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_gpt(folder, depth=2)
    dbconvert.split(str(folder / "gpt.py"), out=str(folder / "package"), options=SplitOptions(blocks=2))
    return folder


def trained(place, name, *more):
    data = [f"data.source={place / 'fox.txt'}", "data.tokenizer=char", "data.length=24", "data.validation=null"]
    overrides = [*data, "train.steps=3", "train.batch=8", *more]
    return dbconvert.train(str(place / "package"), overrides=overrides, out=str(place / name)).folder


@pytest.fixture(scope="module")
def run(place):
    return trained(place, "run")


@pytest.fixture(scope="module")
def teacher(place):
    """A small trained Transformers model with a tokenizer of its own, as a folder."""
    import transformers

    folder = save_bpe(place / "teacher")
    config = transformers.GPT2Config(vocab_size=270, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def judged(run, *overrides, seed=0):
    return dbconvert.evaluate(str(run), part="train", overrides=[*FEW, *overrides], seed=seed).metrics


def test_eval_counts_repetition(run):
    found = judged(run)
    names = {"distinct_2", "distinct_2_data", "repetition", "repetition_data"}
    assert names <= found.keys() and all(0 <= found[name] <= 1 for name in names)
    assert "teacher_perplexity" not in found and "mauve" not in found
    assert found == judged(run) and found["distinct_2"] != judged(run, seed=1)["distinct_2"]
    greedy = judged(run, "eval.temperature=0", "eval.prompt=2", "eval.tokens=20")
    assert greedy["repetition"] > 0.5 > greedy["repetition_data"]


def test_nothing_without_samples(run):
    assert not {"distinct_2", "repetition"} & dbconvert.evaluate(str(run), overrides=FEW[:2]).metrics.keys()


@pytest.mark.parametrize("method", ["end-to-end"])
def test_of_baselines(place, method):
    assert "distinct_2" in judged(trained(place, method, f"train.method={method}"), "eval.top_p=0.9")


def test_of_masked_text(place, tmp_path):
    package = str(tmp_path / "package")
    dbconvert.split(str(place / "gpt.py"), out=package, options=SplitOptions(blocks=2), task="masked_lm")
    data = [f"data.source={place / 'fox.txt'}", "data.tokenizer=char", "data.length=24", "data.validation=null"]
    run = dbconvert.train(package, overrides=[*data, "train.steps=2", "train.batch=8"], out=str(tmp_path / "run"))
    found = dbconvert.evaluate(str(run.folder), overrides=["eval.draws=1", "eval.samples=5"]).metrics
    assert 0 < found["distinct_2"] <= 1 and "bits_per_character" in found
    with pytest.raises(UsageError, match="top-p"):
        judged(run.folder, "eval.top_p=0.5")


def test_a_teacher_reads_samples_and_data(run, teacher):
    asked = ["eval", run, "--part", "train", "--json", *FEW, f"eval.teacher={teacher}"]
    found = json.loads(commands.dbconvert(*asked).stdout)["metrics"]
    assert found["teacher_perplexity"] > 1 and found["teacher_perplexity_data"] > 1
    assert found["teacher_perplexity"] != found["teacher_perplexity_data"]


def test_what_a_teacher_counts(teacher):
    """As Transformers itself: of what follows the prompt, every token of the teacher's own."""
    reader = open_reader(str(teacher), scores=True, device=torch.device("cpu"))
    before, after = reader.encode("the cat"), reader.encode(" sat on the mat")
    tokens = torch.tensor([[*before, *after]])
    labels = tokens.clone()
    labels[:, : len(before)] = -100
    with torch.no_grad():
        loss = float(reader.model(input_ids=tokens, labels=labels).loss)
    nats, count = reader.nats("the cat", " sat on the mat")
    assert count == len(after) and nats / count == pytest.approx(loss, rel=1e-5)
    assert reader.nats("", "the cat")[1] == len(before) - 1 and reader.nats("the", "") == (0.0, 0)


def test_an_even_teacher_has_the_perplexity_of_its_vocabulary(run, teacher):
    from dbconvert.engine.generated import perplexity

    reader = open_reader(str(teacher), scores=True, device=torch.device("cpu"))
    for parameter in reader.model.parameters():
        parameter.data.zero_()
    assert perplexity(reader, ["the", "a"], [" cat", " dog sat"]) == pytest.approx(270, rel=1e-4)


def test_mauve_is_asked_as_it_should(run, teacher, monkeypatch):
    asked = {}
    fake = SimpleNamespace(compute_mauve=lambda **given: asked.update(given) or SimpleNamespace(mauve=0.5))
    monkeypatch.setitem(sys.modules, "mauve", fake)
    assert judged(run, f"eval.mauve={teacher}")["mauve"] == 0.5
    assert asked["p_features"].shape == asked["q_features"].shape == (6, 16)
    assert asked["mauve_scaling_factor"] == 0.2 and not (asked["p_features"] == asked["q_features"]).all()


def test_features_are_those_of_the_last_token(teacher):
    import transformers

    reader = open_reader(str(teacher), scores=False, device=torch.device("cpu"))
    model = transformers.GPT2Model.from_pretrained(teacher).eval()
    with torch.no_grad():
        hidden = model(torch.tensor([reader.encode("the cat sat")])).last_hidden_state
    assert torch.allclose(reader.feature("the cat sat"), hidden[0, -1], atol=1e-6)


def test_mauve_is_an_extra(run, teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(UsageError, match="mauve-text") as error:
        judged(run, f"eval.mauve={teacher}")
    assert "pip install 'dbconvert[mauve]'" in error.value.hint


@pytest.mark.skipif(find_spec("mauve") is None, reason="mauve-text is not installed")
def test_mauve_itself(run, teacher):
    assert 0 <= judged(run, f"eval.mauve={teacher}", "eval.samples=40")["mauve"] <= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.samples=0", "eval.teacher=x"], "eval.teacher is about samples"),
        (["eval.samples=0", "eval.prompt=3"], "eval.prompt is about samples"),
        (["eval.temperature=-1"], "eval.temperature must not be negative"),
        (["eval.top_p=0"], "eval.top_p lies in"),
        (["eval.samples=100000"], "samples need as many examples of 24 tokens"),
        (["eval.prompt=20", "eval.tokens=8"], "more than an example's 24"),
        (["eval.tokens=3"], "too few to judge"),
        (["eval.prompt=22"], "too few to judge"),
        (["eval.teacher=no/such/place"], "there is no model no/such/place"),
        (["eval.mauve=no/such/place"], "there is no model no/such/place"),
        (["eval.sample=3"], "unknown key sample"),
    ],
)
def test_what_makes_no_sense_is_refused(run, overrides, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace())
    with pytest.raises(UsageError, match=message):
        judged(run, *overrides)


def test_folders_that_are_no_teacher(run, place, teacher, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DBConvertError, match="cannot read a causal language model"):
        judged(run, f"eval.teacher={tmp_path / 'empty'}")
    short = Reader(open_reader(str(teacher), scores=True, device=torch.device("cpu")).model, None, "short")
    with pytest.raises(DBConvertError, match="a text has 65 tokens of short, which reads 1 to 64"):
        short.run([1] * 65)


def test_pictures_are_no_text(run_of_all):
    with pytest.raises(UsageError, match=r"eval\.samples is for networks of text"):
        judged(run_of_all.folder)


def test_training_takes_no_samples(place):
    with pytest.raises(UsageError, match=r"eval\.samples is about samples, and training takes none"):
        trained(place, "never", "eval.samples=3")


def test_padded_documents_long_enough_are_continued(place, tmp_path):
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": FOX[: 4 + 3 * i]}) for i in range(9)))
    data = [f"data.source={tmp_path / 'docs.jsonl'}", "data.pack=false", "data.train=all"]
    run = trained(place, "padded", *data)
    options = ["eval.draws=0", "eval.sigmas=0", "eval.prompt=6", "eval.tokens=10"]
    found = dbconvert.evaluate(str(run), part="all", overrides=[*options, "eval.samples=5"]).metrics
    assert math.isfinite(found["distinct_2"]) and load(run).data.pack is False
    with pytest.raises(UsageError, match="and there are 5"):
        dbconvert.evaluate(str(run), part="all", overrides=[*options, "eval.samples=6"])
