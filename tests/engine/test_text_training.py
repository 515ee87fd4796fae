"""Text from the recipe to generated text: trained, resumed, assembled, evaluated; alone and together; with errors."""

import json

import networks
import pytest
import torch
from safetensors import safe_open
from small_text import FOX, QUICK, corpus_in, write_gpt
from tokenizer_files import save_bpe

import dbconvert
from dbconvert.engine.generate import Decoding
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.recipe import SplitOptions


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small GPT, a text, and its package."""
    folder = tmp_path_factory.mktemp("text")
    write_gpt(folder, depth=4)
    options = SplitOptions(blocks=2)
    dbconvert.split(str(folder / "gpt.py"), out=str(folder / "package"), options=options)
    return folder


@pytest.fixture(scope="module")
def corpus(place):
    return corpus_in(place)


@pytest.fixture(scope="module")
def trained(place, corpus):
    return dbconvert.train(str(place / "package"), overrides=corpus, out=str(place / "run"))


def test_a_run_of_all_blocks(place, trained):
    assert {
        "loss_block_1",
        "loss_first",
        "accuracy_first",
        "loss_first_draw",
        "accuracy_zero",
    } <= trained.metrics.keys()
    kept = json.loads((trained.folder / "tokenizer_used.json").read_text())
    assert kept["kind"] == "char" and set(kept["characters"]) == set(FOX)
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 8


def test_a_checkpoint_evaluates_and_generates_alone(place, trained, corpus, tmp_path):
    path = dbconvert.assemble([str(trained.folder)], out=str(tmp_path / "fox.safetensors"))
    with safe_open(path, "pt") as file:
        assert "dbconvert.tokenizer" in file.metadata()
    found = dbconvert.evaluate(str(path), part="validation", overrides=[corpus[-2], "data.length=16", "eval.draws=1"])
    assert found.metrics["loss_first"] == pytest.approx(trained.metrics["loss_first"], abs=1e-5)
    first, again = ("".join(dbconvert.generate(str(path), "the ", tokens=12, cache=cache)) for cache in (True, False))
    assert first == again and len(first) == 12 and set(first) <= set(FOX)
    drawn = Decoding(temperature=1.0, top_k=3)
    one, two = ("".join(dbconvert.generate(str(path), "the ", tokens=9, decoding=drawn, seed=s)) for s in (1, 2))
    assert one != two


def test_interrupted_and_resumed_to_the_bit(place, corpus, trained, tmp_path, monkeypatch):
    from dbconvert.engine.loop import Loop

    whole = Loop.update

    def pulled(self, block, batch):
        if self.updates == 5:
            raise KeyboardInterrupt
        return whole(self, block, batch)

    monkeypatch.setattr(Loop, "update", pulled)
    overrides = [*corpus, "train.checkpoint_every=2"]
    with pytest.raises(KeyboardInterrupt):
        dbconvert.train(str(place / "package"), overrides=overrides, out=str(tmp_path / "r"))
    monkeypatch.undo()
    found = dbconvert.train(str(place / "package"), resume=True, out=str(tmp_path / "r"))
    assert found.metrics == trained.metrics


@pytest.mark.parametrize("method", ["end-to-end", "shallow"])
def test_baselines(place, corpus, tmp_path, method):
    run = dbconvert.train(
        str(place / "package"), overrides=[*corpus, f"train.method={method}"], out=str(tmp_path / "run")
    )
    assert set(run.metrics) == {"accuracy", "loss"}
    assert len("".join(dbconvert.generate(str(run.folder), "the ", tokens=5))) == 5


def test_blocks_alone_with_a_table_of_their_own(place, corpus, tmp_path):
    """Independent jobs, put together; each generates nothing by itself, all of them do."""
    package = str(tmp_path / "package")
    dbconvert.split(str(place / "gpt.py"), out=package, options=SplitOptions(blocks=2, table="fresh"))
    alone = [*corpus, "train.periphery=frozen-target"]
    runs = [
        dbconvert.train(package, overrides=alone, block=b, out=str(tmp_path / f"block{b}")).folder for b in range(2)
    ]
    path = dbconvert.assemble(map(str, runs), out=str(tmp_path / "both.safetensors"))
    texts = ["".join(dbconvert.generate(str(path), "the ", tokens=8, cache=cache)) for cache in (True, False)]
    assert texts[0] == texts[1] and len(texts[0]) == 8


def test_own_embeddings_cannot_be_targets_of_independent_blocks(place, corpus, tmp_path):
    with pytest.raises(UsageError, match="own embeddings") as error:
        dbconvert.train(
            str(place / "package"), overrides=[*corpus, "train.periphery=frozen-target"], out=str(tmp_path / "r")
        )
    assert "--table fresh" in error.value.hint and not (tmp_path / "r").exists()


def test_a_transformers_model_with_its_tokenizer(place, tmp_path):
    """Documents one by one, padded; the tokenizer is the folder's own and travels on."""
    import transformers

    save_bpe(tmp_path / "m")
    config = transformers.LlamaConfig(**{**networks.llama_config().to_dict(), "vocab_size": 270})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    (tmp_path / "docs.jsonl").write_text(
        "\n".join(json.dumps({"text": "the cat sat on the mat " * n}) for n in range(1, 9))
    )
    package = str(tmp_path / "p")
    dbconvert.split(str(tmp_path / "m"), out=package, options=SplitOptions(blocks=2))
    data = [f"data.source={tmp_path / 'docs.jsonl'}", "data.pack=false", "data.validation=null", "data.test=null"]
    run = dbconvert.train(package, overrides=[*QUICK, "train.batch=4", *data], out=str(tmp_path / "r"))
    folder = dbconvert.assemble([str(run.folder)], out=str(tmp_path / "whole"))
    assert "".join(dbconvert.generate(str(folder), "the cat", tokens=3))


def test_levels_of_every_position(place, corpus, tmp_path):
    """They cost memory: modulation is saved for every position."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"source: {place / 'gpt.py'}\nsplit: {{blocks: 2}}\n")
    plain = dbconvert.train(str(recipe), overrides=corpus, out=str(tmp_path / "plain"))
    run = dbconvert.train(str(recipe), overrides=[*corpus, "noise.per=position"], out=str(tmp_path / "r"))
    assert run.metrics["loss_first"] > 0
    assert run.memory.largest.activations > 1.1 * plain.memory.largest.activations


def test_packed_documents_do_not_see_each_other(place, corpus, tmp_path):
    run = dbconvert.train(str(place / "package"), overrides=[*corpus, "data.documents=masked"], out=str(tmp_path / "r"))
    assert run.metrics["loss_first"] > 0


# -- errors -----------------------------------------------------------------------------------------------------


def test_a_vocabulary_that_exceeds_the_table(place, tmp_path):
    save_bpe(tmp_path / "bpe")
    data = [*QUICK, f"data.source={place / 'fox.txt'}", f"data.tokenizer={tmp_path / 'bpe'}"]
    with pytest.raises(DBConvertError, match="the tokenizer has 270 tokens, and the network's table 128 rows"):
        dbconvert.train(str(place / "package"), overrides=data, out=str(tmp_path / "r"))


def test_a_prompt_longer_than_the_positions(place, corpus, tmp_path):
    import transformers

    config = transformers.GPT2Config(
        **{
            **networks.gpt2_config().to_dict(),
            "vocab_size": 128,
            "n_positions": 16,
            "architectures": ["GPT2LMHeadModel"],
        }
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    dbconvert.split(str(tmp_path / "m"), out=str(tmp_path / "p"), options=SplitOptions(blocks=2))
    overrides = [*corpus, "data.length=12"]
    run = dbconvert.train(str(tmp_path / "p"), overrides=overrides, out=str(tmp_path / "r"))
    with pytest.raises(UsageError, match="the prompt has 25 tokens, and the network has positions for 16"):
        dbconvert.generate(str(run.folder), "the quick brown fox jumps", tokens=3)
    with pytest.raises(DBConvertError, match=r"fails on 17 tokens") as error:
        list(dbconvert.generate(str(run.folder), "the quick brown", tokens=3))
    assert "positions" in error.value.hint


@pytest.mark.parametrize(
    ("target", "prompt", "reason"), [("run", "", "the prompt is empty"), ("digits", "a", "does not generate text")]
)
def test_nothing_to_generate(trained, run_of_all, target, prompt, reason):
    folder = trained.folder if target == "run" else run_of_all.folder
    with pytest.raises(UsageError, match=reason):
        dbconvert.generate(str(folder), prompt)


def test_wrong_decoding(trained):
    with pytest.raises(UsageError, match="top-p"):
        dbconvert.generate(str(trained.folder), "a", decoding=Decoding(top_p=0.0))


def test_no_tokenizer_and_no_length(place, tmp_path):
    source = f"data.source={place / 'fox.txt'}"
    for missing, given in (("no tokenizer", ["data.length=16"]), ("how long", ["data.tokenizer=byte"])):
        with pytest.raises(UsageError, match=missing):
            overrides = ["train.steps=1", source, *given]
            dbconvert.train(str(place / "package"), overrides=overrides, out=str(tmp_path / "r"))


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.attention=flex", "no backward pass on CPU"), ("train.attention=other", "train.attention")],
)
def test_attention_that_cannot_train_here_is_refused(tmp_path, monkeypatch, override, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=message):
        dbconvert.train("ar_text_tiny", overrides=[override], out=str(tmp_path / "run"))
