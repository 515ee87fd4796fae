"""Examples of text: chunks or documents, their masks, their counts, and their place in the loop's batches."""

from pathlib import Path

import pytest
import torch
from tokenizer_files import save_bpe

from dbconvert.data.batches import OrderedBatches, in_order, load_batches
from dbconvert.data.tokenizer_opening import open_tokenizer
from dbconvert.data.tokenizers import ByteTokenizer
from dbconvert.data.tokens import open_text
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError, UsageError

TEXT = "".join(f"line {i}\n" for i in range(200))
LINES = '{"text": "one"}\n{"text": ""}\n{"text": "two and three"}\n'


@pytest.fixture(autouse=True)
def files():
    Path("a.txt").write_text(TEXT)
    Path("rows.jsonl").write_text(LINES)


def opened(part="all", tokenizer=None, **options):
    options = DataOptions(**{"source": "rows.jsonl", "length": 5, **options})
    return open_text(options, part, tokenizer or ByteTokenizer())


def rows(examples, key="tokens"):
    return examples.__getitems__(list(range(len(examples))))[key]


def test_packed_documents_are_cut_into_whole_chunks():
    examples = opened()
    tokens = rows(examples)
    assert tokens.dtype == torch.int64 and tokens.shape == (3, 5)
    assert bytes(tokens.flatten().tolist()) == b"one\ntwo and thr"  # empty documents and the rest are left out
    assert set(examples.__getitems__([0])) == {"tokens"}


def test_documents_of_a_chunk_can_be_told_apart():
    examples = opened(documents="masked", length=6)
    assert rows(examples, "documents").tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6, [0] * 6]
    batch = opened(documents="masked", length=2).__getitems__([1, 2])
    assert batch["documents"].tolist() == [[0, 0], [0, 0]]  # an end token belongs to its document


def test_without_packing_every_document_is_an_example():
    Path("rows.jsonl").write_text(LINES.replace('{"text": ""}\n', ""))
    batch = opened(pack=False).__getitems__([1, 0])
    assert [bytes(row.tolist()) for row in batch["tokens"]] == [b"two a", b"one\n\0"]
    assert batch["valid"].tolist() == [[True] * 5, [True] * 4 + [False]]
    assert "documents" not in batch and opened(pack=False, documents="masked").__getitems__([0])["documents"].sum() == 0


def test_padding_is_the_tokenizers(tmp_path):
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    for name, special in (("with", {"eos_token": "<|end|>", "pad_token": "<|pad|>"}), ("without", {})):
        tokenizer = open_tokenizer(DataOptions(tokenizer=str(save_bpe(tmp_path / name, **special))))
        expected = tokenizer.pad if name == "with" else tokenizer.eos
        assert rows(opened(tokenizer=tokenizer, pack=False))[0].tolist()[1:] == [tokenizer.eos] + [expected] * 3


def test_parts_of_a_text_file_make_up_the_file():
    parts = [opened(part, source="a.txt", length=1) for part in ("train", "validation", "test")]
    found = ["".join(ByteTokenizer().decode(rows(part).flatten().tolist()[:-1])) for part in parts]
    assert "".join(found) == TEXT and [len(part) for part in parts] == [len(f) + 1 for f in found]


def test_counts_of_tokens(monkeypatch):
    counts = opened().token_counts()
    assert counts.dtype == torch.float64 and counts.shape == (256,)
    assert counts.sum() == 18 and counts[ord("e")] == 3 and counts[ord("\n")] == 2
    monkeypatch.setattr("dbconvert.data.tokens.WINDOW", 4)
    monkeypatch.setattr("dbconvert.data.tokens.WINDOWS", 2)
    sampled = opened().token_counts()
    assert sampled.sum() == 8 and sampled[ord("o")] == 1  # "one\n" and "nd t"


def test_characters_a_token():
    Path("rows.jsonl").write_text('{"text": "über"}\n')
    assert opened().characters_per_token == 4 / 6


def test_examples_go_through_the_loops_batches():
    examples = opened("train", source="a.txt", length=7)
    order = OrderedBatches(len(examples), 4, [0, 1, 0], seed=3)
    expected = [examples.__getitems__(indices)["tokens"] for indices in order]
    for workers in (0, 1):
        batches = [batch["tokens"] for batch in load_batches(examples, order, workers)]
        assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))
    assert torch.equal(torch.cat([batch["tokens"] for batch in in_order(examples, 16)]), rows(examples))


def test_the_default_source_of_small_recipes():
    examples = open_text(DataOptions(source="pydoc", length=64), "train", ByteTokenizer())
    assert len(examples) > 5000 and examples.token_counts()[128:].sum() > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": None}, UsageError, r"how long is an example of text\?\n.*data.length"),
        ({"length": 19}, DBConvertError, r"shorter than one example\n.*18 tokens, and data.length is 19\n"),
        ({"pack": False}, DBConvertError, r"1 empty documents, whose .*padding only\n.*data.pack=true"),
        ({"source": "empty.txt"}, DBConvertError, "empty.txt holds no text"),
        ({"source": "empty.jsonl"}, DBConvertError, "empty.jsonl holds no text"),
    ],
)
def test_text_that_makes_no_examples_is_told(options, error, message):
    Path("empty.txt").write_text("")
    Path("empty.jsonl").write_text("")
    with pytest.raises(error, match=message):
        opened(**options)


def test_a_part_without_documents_is_told():
    with pytest.raises(DBConvertError, match=r"part validation of rows.jsonl holds no text"):
        opened("validation")
