"""What people give by mistake, at the command line: one message that says what, why and what to do."""

import json
from pathlib import Path

import commands
import datasets
import pytest
from tokenizer_files import save_bpe

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 20
TASKS = {"causal_lm": "gpt.py", "masked_lm": "encoder.py"}
QUICK = ["train.steps=1", "train.batch=4", "data.length=16", "data.validation=null"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A package of each task, and good and bad text."""
    folder = tmp_path_factory.mktemp("bad")
    for task, name in TASKS.items():
        source = (EXAMPLES / name).read_text()
        small = source.replace("depth=6, width=96", "depth=2, width=16").replace(
            "depth=6, width=64", "depth=2, width=16"
        )
        assert small != source
        (folder / name).write_text(small.replace("positions=64", "positions=32"))
        commands.dbconvert("split", folder / name, "--blocks", "2", "--task", task, "-o", folder / task)
    (folder / "fox.txt").write_text(TEXT)
    (folder / "empty.txt").write_text("")
    datasets.disable_progress_bars()
    rows = [TEXT[:30], "", TEXT[:20], TEXT[:40]]
    datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / "rows.parquet")
    save_bpe(folder / "bpe")
    return folder


def refused(*arguments, code):
    """The lines of the message; a traceback, or a second message, is no answer."""
    told = commands.dbconvert(*arguments, code=code).stderr
    assert "Traceback" not in told and told.count("error:") == 1, told
    return told


def training(task, place, *overrides):
    return ["train", place / task, f"data.source={place / 'fox.txt'}", "data.tokenizer=char", *QUICK, *overrides]


@pytest.mark.parametrize("task", TASKS)
def test_an_empty_corpus(place, task):
    for tokenizer in ("char", "byte"):
        given = [f"data.source={place / 'empty.txt'}", f"data.tokenizer={tokenizer}", "-o", "run"]
        assert "empty.txt holds no text" in refused(*training(task, place, *given), code=1)
    assert not list(Path("run").glob("*.json")) and not list(Path("cache").rglob("*.tokens"))


def test_a_table_without_rows(place):
    datasets.Dataset.from_dict({"text": []}).to_parquet("none.parquet")
    given = ["data.source=none.parquet", "-o", "run"]
    assert "none.parquet holds no text" in refused(*training("causal_lm", place, *given), code=1)


@pytest.mark.parametrize("task", TASKS)
def test_a_vocabulary_that_exceeds_the_table(place, task):
    told = refused(*training(task, place, f"data.tokenizer={place / 'bpe'}"), code=1)
    assert "the tokenizer has 270 tokens, and the network's table 128 rows" in told and "data.tokenizer" in told


@pytest.mark.parametrize("task", TASKS)
def test_a_model_without_a_language_head(place, task):
    split = ["split", "--task", task, "--blocks", "2", "-o", "out"]
    told = refused(*split, EXAMPLES / "vit.py", code=2)
    assert "no table of embeddings" in told or "no language head" in told
    headless = (place / TASKS[task]).read_text().replace("self.head(self.norm(x))", "self.norm(x).tanh()")
    Path("model.py").write_text(headless)
    assert "the network has no language head" in refused(*split, "model.py", code=2)
    assert not Path("out").exists()


@pytest.mark.parametrize("task", TASKS)
def test_a_sequence_of_padding_only(place, task):
    given = [f"data.source={place / 'rows.parquet'}", "data.train=train[:3]", "data.test=null", "data.pack=false"]
    told = refused(*training(task, place, *given), code=1)
    assert "1 empty documents, whose examples would be padding only" in told and "data.pack=true" in told


def test_a_prompt_longer_than_what_was_trained(place):
    commands.dbconvert(*training("masked_lm", place), "-o", "run")
    told = refused("generate", "run", "--prompt", TEXT[:40], code=2)
    assert "the prompt has 40 tokens, and the network was trained on 16" in told


def test_a_prompt_longer_than_the_positions(place):
    """Rotary positions would go on without an error; those of the configuration count."""
    settings = json.loads((EXAMPLES / "llama_lm1b" / "config.json").read_text())
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    Path("llama").mkdir()
    Path("llama/config.json").write_text(json.dumps({**settings, **small, **heads, "max_position_embeddings": 24}))
    commands.dbconvert("split", "llama", "--blocks", "2", "--task", "causal_lm", "-o", place / "llama")
    commands.dbconvert(*training("llama", place), "-o", "run")
    commands.dbconvert("assemble", "run", "-o", "m.safetensors")
    for target in ("run", "m.safetensors"):
        told = refused("generate", target, "--prompt", TEXT[:24], code=2)
        assert "the prompt has 24 tokens, and the network has positions for 24" in told and "shorten" in told
    assert commands.dbconvert("generate", "run", "--prompt", TEXT[:20], "--tokens", "2").stdout.startswith(TEXT[:20])
