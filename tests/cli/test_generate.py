"""`dbconvert generate` where it goes wrong: one message, and no text before a prompt that the network does not take."""

import pytest
from small_text import corpus_in, write_gpt

import dbconvert
from dbconvert.cli.main import guarded
from dbconvert.recipe import SplitOptions

PLACES = {
    "        self.pairs = ": "        self.places = nn.Embedding(20, width)\n        self.pairs = ",
    "x = self.tokens(tokens)": "x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))",
}
"""Learnt positions for 20 tokens, in place of none."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    write_gpt(folder, depth=2)
    source = (folder / "gpt.py").read_text()
    for old, new in PLACES.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    (folder / "gpt.py").write_text(
        source.replace("torch.arange(2 * 32).view(2, 32)", "torch.arange(2 * 16).view(2, 16)")
    )
    dbconvert.split(str(folder / "gpt.py"), out=str(folder / "package"), options=SplitOptions(blocks=2))
    return folder


@pytest.fixture(scope="module", params=["blocks", "end-to-end"])
def run(request, place):
    given = [*corpus_in(place), "train.steps=1", "data.validation=null", f"train.method={request.param}"]
    return dbconvert.train(str(place / "package"), overrides=given, out=str(place / request.param)).folder


def said(capsys, run, *arguments, code):
    """(what was written, what was told)."""
    assert guarded(["generate", str(run), *arguments], debug=False) == code
    out, told = capsys.readouterr()
    assert told.count("error:") == (code > 0) and "Traceback" not in told
    return out, " ".join(told.split())


def test_a_prompt_longer_than_learnt_positions(capsys, run):
    """Refused before it is echoed, by one message that says nothing of caches."""
    out, told = said(capsys, run, "--prompt", "the quick brown fox jumps", code=2)
    assert out == "" and "warning" not in told
    assert "does not take the prompt of 25 tokens" in told and "index out of range" in told
    assert "it was trained on 16: shorten the prompt" in told


def test_positions_that_end_while_a_text_is_written(capsys, run):
    """The message stands on a line of its own, and what it says to try works."""
    out, told = said(capsys, run, "--prompt", "the quick brown", code=1)
    assert out.startswith("the quick brown") and out.endswith("\n")
    count = len(out) - len("the quick brown\n")
    assert f"after {count} tokens were written" in told and f"--tokens {count}" in told
    assert said(capsys, run, "--prompt", "the quick brown", "--tokens", str(count), code=0)[0] == out


def test_characters_that_the_tokenizer_does_not_know(capsys, run):
    out, told = said(capsys, run, "--prompt", "thé fox €€", "--tokens", "3", code=0)
    assert out.startswith("thé fox €€")
    assert told.count("warning:") == 1 and "the training text did not have: 'é', '€'; all become one token" in told
    assert "warning" not in said(capsys, run, "--prompt", "the fox", "--tokens", "3", code=0)[1]


def test_wrong_numbers(capsys, run):
    told = said(capsys, run, "--prompt", "the", "--tokens", "-3", code=2)[1]
    assert "-3 tokens cannot be written" in told and "--tokens" in told
    assert guarded(["sample", str(run), "--guidance", "-1"], debug=False) == 2
    assert "guidance" in capsys.readouterr().err
