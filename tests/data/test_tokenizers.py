"""Text to tokens and back, and tokenizers that are stored and found again."""

import json
from pathlib import Path

import pytest
from tokenizer_files import END, MASK, PAD, save_bpe

from dbconvert.data.tokenizer_opening import from_description, open_tokenizer
from dbconvert.data.tokenizers import ByteTokenizer, CharTokenizer, Description, TransformersTokenizer
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.schema import parse, to_json
from dbconvert.sources.tokenizers import load_tokenizer

TEXT = "The cat's\thät 🐈\r\n\n  sat \N{REPLACEMENT CHARACTER}."


@pytest.fixture
def tokenizers(tmp_path):
    folder = save_bpe(tmp_path / "bpe")
    return [
        ByteTokenizer(),
        CharTokenizer("".join(sorted(set(TEXT)))),
        TransformersTokenizer(load_tokenizer(str(folder)), "bpe"),
    ]


def test_text_comes_back_from_its_tokens(tokenizers):
    for tokenizer in tokenizers:
        tokens = tokenizer.encode(TEXT)
        assert tokenizer.decode(tokens) == TEXT and tokenizer.encode("") == []
        assert min(tokens) >= 0 and max(tokens) < tokenizer.size
        assert [found.tolist() for found in tokenizer.encode_many([TEXT, "at"])] == [tokens, tokenizer.encode("at")]


def test_sizes_and_special_tokens(tokenizers, tmp_path):
    by, char, bpe = tokenizers
    assert (by.size, by.eos, by.pad, by.mask, by.end) == (256, None, None, None, [10])
    assert (char.size, char.eos, char.end) == (len(set(TEXT)) + 1, None, char.encode("\n"))
    assert CharTokenizer("ab").end == []
    assert (bpe.eos, bpe.pad, bpe.mask, bpe.end) == (0, None, None, [0])
    assert bpe.size == len(load_tokenizer("bpe"))
    save_bpe("masked", sep_token=END, pad_token=PAD, mask_token=MASK)
    masked = TransformersTokenizer(load_tokenizer("masked"), "masked")
    assert masked.decode([masked.pad, masked.mask]) == PAD + MASK and masked.end == [masked.eos] == [0]


def test_tokens_that_are_no_text_are_replaced(monkeypatch):
    assert ByteTokenizer().decode([104, 105, 0xC3]) == "hi\N{REPLACEMENT CHARACTER}"
    assert ByteTokenizer().decode([300]) == "\N{REPLACEMENT CHARACTER}"
    char = CharTokenizer("abd")
    assert char.encode("abcde") == [0, 1, 3, 2, 3]
    monkeypatch.setattr("dbconvert.data.tokenizers.PIECE", 2)
    assert char.encode("abcde") == [0, 1, 3, 2, 3]
    assert char.decode([0, 3, 9]) == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"


def test_the_vocabulary_of_char_is_the_training_parts():
    Path("a.txt").write_text("abcab" * 18 + "xxxxxyyyyy")
    char = open_tokenizer(DataOptions(source="a.txt", tokenizer="char"))
    assert char.characters == "abc"  # one document: no line break is needed
    Path("rows.jsonl").write_text('{"text": "ab"}\n' * 20)
    assert open_tokenizer(DataOptions(source="rows.jsonl", tokenizer="char")).characters == "\nab"
    Path("empty.txt").write_text("")
    with pytest.raises(DBConvertError, match=r"empty.txt holds no text"):
        open_tokenizer(DataOptions(source="empty.txt", tokenizer="char"))


def test_a_tokenizer_beside_the_source_is_taken_where_none_is_named(tmp_path):
    folder = save_bpe(tmp_path / "bpe")
    assert isinstance(open_tokenizer(DataOptions(), beside=folder), TransformersTokenizer)
    assert isinstance(open_tokenizer(DataOptions(tokenizer="byte"), beside=folder), ByteTokenizer)
    for beside in (None, tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match=r"no tokenizer is given\n.*data.tokenizer=NAME"):
            open_tokenizer(DataOptions(), beside=beside)


def test_stored_tokenizers_come_back(tokenizers, tmp_path):
    for tokenizer in tokenizers:
        tokenizer.encode(TEXT)
        folder = tmp_path / "stored"
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)
        description = parse(Description, json.loads(to_json(tokenizer.describe())), file="x")
        again = from_description(description, [tmp_path, folder])
        assert again.fingerprint == tokenizer.fingerprint and again.encode(TEXT) == tokenizer.encode(TEXT)
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 3


def test_settings_of_a_batch_do_not_make_another_tokenizer(tmp_path):
    folder = save_bpe(tmp_path / "bpe")
    before = TransformersTokenizer(load_tokenizer("bpe"), "bpe").fingerprint
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    again = TransformersTokenizer(load_tokenizer("bpe"), "bpe")
    assert again.fingerprint == before and len(again.encode("the cat " * 20)) > 4
    assert before != TransformersTokenizer(load_tokenizer(str(save_bpe("other", size=265))), "other").fingerprint


def test_a_stored_tokenizer_is_only_read_from_places_that_the_caller_names(tmp_path):
    folder = save_bpe(tmp_path / "bpe")
    stored = TransformersTokenizer(load_tokenizer("bpe"), str(folder)).describe()
    with pytest.raises(DBConvertError, match=r"the tokenizer's files are missing\n(.*\n)*.*it was .*bpe"):
        from_description(stored, [tmp_path])
    with pytest.raises(DBConvertError, match="is not the one that the network was trained with"):
        from_description(stored, [save_bpe("other", size=265)])


@pytest.mark.parametrize("characters", ["ba", "aa", "", None])
def test_a_damaged_description_is_told(characters):
    with pytest.raises(DBConvertError, match="in their order"):
        from_description(Description("char", "0", 3, characters=characters))
    with pytest.raises(DBConvertError, match="description of the char tokenizer is damaged"):
        from_description(Description("char", "0", 3, characters="abc"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent", "there is no tokenizer ./absent"),
        ("a.txt", "a.txt is not a folder"),
        ("empty", "empty holds no tokenizer"),
        ("broken", "cannot read a tokenizer from broken"),
        ("unfinished", "cannot read a tokenizer from unfinished"),
        ("bytes", "cannot read a tokenizer from bytes"),
        ("org/model", "cannot read a tokenizer from org/model"),
    ],
)
def test_what_is_no_tokenizer_is_told(name, message):
    Path("a.txt").write_text("a")
    for folder, file in (
        ("empty", "config.json"),
        ("broken", "tokenizer.json"),
        ("unfinished", "tokenizer_config.json"),
    ):
        Path(folder).mkdir()
        (Path(folder) / file).write_text("{" if folder == "broken" else "{}")
    with pytest.raises(DBConvertError, match=rf"{message}(\n.*)*byte"):
        open_tokenizer(DataOptions(tokenizer=name))
