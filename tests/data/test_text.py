"""Where documents of text come from: built-in, files, folders, tables, hub ids, functions."""

import sys
from itertools import chain
from pathlib import Path

import datasets
import pytest

from dbconvert.data.tables import place_of
from dbconvert.data.text import open_documents
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError, UsageError

PARTS = ("train", "validation", "test")
TEXT = "".join(f"line {i} über\n" for i in range(200))
ROWS = [f"document {i}" for i in range(100)]


def texts(part="train", **options):
    return list(open_documents(DataOptions(**options), part))


def fingerprint(part="train", **options):
    return open_documents(DataOptions(**options), part).fingerprint


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


# -- built-in ---------------------------------------------------------------------------------------------------


def test_pydoc_parts_are_fixed_disjoint_and_complete():
    from pydoc_data.topics import topics

    parts = {part: texts(part, source="pydoc") for part in PARTS}
    assert sorted(chain(*parts.values())) == sorted(topics.values()) == sorted(texts("all", source="pydoc"))
    sizes = {part: sum(map(len, found)) for part, found in parts.items()}
    assert sizes["train"] > 300_000 and min(sizes["validation"], sizes["test"]) > 20_000
    assert parts["train"] == texts("train", source="pydoc")


# -- one file ---------------------------------------------------------------------------------------------------


def test_a_text_file_is_cut_by_position():
    Path("a.txt").write_text(TEXT, encoding="utf-8")
    parts = [texts(part, source="a.txt") for part in PARTS]
    assert [len(found) for found in parts] == [1, 1, 1] and "".join(found[0] for found in parts) == TEXT
    assert [round(100 * len(found[0]) / len(TEXT)) for found in parts] == [90, 5, 5]
    assert texts("all", source="a.txt") == [TEXT]


def test_parts_in_files_of_their_own_leave_the_whole_file_for_training(tmp_path):
    (tmp_path / "c").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / "c" / f"{name}.txt").write_text(name)
    given = {"source": "c/train.txt", "validation": "valid.txt", "test": "c/test.txt"}
    assert [texts(part, **given) for part in ("train", "valid.txt", "c/test.txt")] == [["train"], ["valid"], ["test"]]
    with pytest.raises(UsageError, match=r"the whole of c/train.txt is its training part"):
        texts("test", **given)
    assert texts(source="c/train.txt", validation=None, test=None) == ["train"]
    assert texts("train", source="c", train="x") == ["train"]  # in a folder each file has its part's name
    assert texts("valid.txt", source="c") == ["valid"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.csv"])
def test_a_table_is_cut_by_rows(name):
    table = datasets.Dataset.from_dict({"text": ROWS, "n": list(range(100))})
    getattr(table, {".jsonl": "to_json", ".json": "to_json"}.get(Path(name).suffix, f"to_{name[5:]}"))(name)
    assert [len(texts(part, source=name)) for part in PARTS] == [90, 5, 5]
    assert list(chain(*(texts(part, source=name) for part in PARTS))) == ROWS
    assert texts("train[:7]", source=name) == ROWS[:7]
    assert texts(source=name, limit=3) == ROWS[:3]


def test_fingerprints_follow_content_and_not_place():
    Path("a.txt").write_text(TEXT)
    Path("b.txt").write_text(TEXT)
    Path("c.txt").write_text(TEXT + "x")
    first = fingerprint(source="a.txt")
    assert first == fingerprint(source="b.txt") != fingerprint(source="c.txt")
    assert len({first, fingerprint("test", source="a.txt"), fingerprint(source="a.txt", limit=1)}) == 3


def test_a_byte_order_mark_is_not_text_and_line_ends_stay():
    Path("a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts("all", source="a.txt") == ["one\r\ntwo"]


# -- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_of_texts_deals_out_its_files(tmp_path):
    names = [f"{i}.txt" for i in range(60)]
    for name in names:
        (tmp_path / "f" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "f" / name).write_text(name)
    parts = [texts(part, source="f") for part in PARTS]
    assert sorted(chain(*parts)) == sorted(names) and [len(p) for p in parts] == [54, 3, 3]


def test_a_folder_with_parts_by_name(tmp_path):
    for name in ("train/a.txt", "train/deep/b.txt", "test/c.txt"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_text(name)
    assert texts(source="f") == ["train/a.txt", "train/deep/b.txt"] and texts("test", source="f") == ["test/c.txt"]
    with pytest.raises(UsageError, match=r"f has no part validation\n.*parts: train, test"):
        texts("validation", source="f")


def save_repository(folder, rows=ROWS):
    folder.mkdir(exist_ok=True)
    for part in ("train", "test"):
        datasets.Dataset.from_dict({"text": [f"{part} {row}" for row in rows]}).to_parquet(folder / f"{part}-0.parquet")


def test_a_folder_of_tables(tmp_path):
    save_repository(tmp_path / "repo")
    assert texts("test", source="repo")[:2] == ["test document 0", "test document 1"]
    assert len(texts("train[:90%]", source="repo")) == 90
    before = fingerprint(source="repo")
    assert before == fingerprint(source="repo") != fingerprint("test", source="repo")
    save_repository(tmp_path / "repo", ROWS[:50])
    assert fingerprint(source="repo") != before


# -- the hub ----------------------------------------------------------------------------------------------------


def test_a_folder_of_tables_without_rows(tmp_path):
    save_repository(tmp_path / "repo", rows=[])
    assert texts(source="repo") == texts("train[:50%]", source="repo") == []
    save_repository(tmp_path / "repo")
    assert len(texts(source="repo")) == len(ROWS)


def test_a_damaged_table_is_told_once(caplog):
    Path("rows.parquet").write_bytes(b"PAR1, and then nothing of the kind")
    with pytest.raises(DBConvertError, match=r"cannot read part train of rows\.parquet") as caught:
        texts(source="rows.parquet")
    assert "magic bytes" in caught.value.why and not caplog.records


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """org/corpus is on the hub; what was asked of the library is kept."""
    save_repository(tmp_path / "repo")
    asked, real = [], datasets.load_dataset_builder

    def load(path, **options):
        asked.append((path, options))
        return real(str(tmp_path / "repo"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    return asked


def test_a_hub_id_is_streamed_or_downloaded(hub, monkeypatch):
    downloads = []
    prepare = datasets.DatasetBuilder.download_and_prepare
    monkeypatch.setattr(
        datasets.DatasetBuilder, "download_and_prepare", lambda self: (downloads.append(1), prepare(self))
    )
    streamed = texts("test", source="org/corpus", streaming=True, limit=5, config="plain", revision="v1")
    assert streamed == [f"test document {i}" for i in range(5)] and not downloads
    assert hub == [("org/corpus", {"revision": "v1", "name": "plain"})]
    assert texts("test", source="org/corpus", limit=5) == streamed and downloads
    given = {"source": "org/corpus", "limit": 5}
    assert fingerprint("test", **given) == fingerprint("test", **given, streaming=True)
    assert fingerprint("test", **given) != fingerprint("test", source="org/other", limit=5)


def test_in_converted_branches_a_configuration_is_a_folder(tmp_path):
    for config in ("plain", "fancy"):
        for part in ("train", "test"):
            folder = tmp_path / "repo" / config / part
            folder.mkdir(parents=True)
            datasets.Dataset.from_dict({"text": [f"{config} {part}"]}).to_parquet(folder / "0000.parquet")
    given = {"source": "repo", "config": "plain", "revision": "refs/convert/parquet"}
    assert place_of(DataOptions(**given)) == {"revision": "refs/convert/parquet", "data_dir": "plain"}
    assert texts("test", **given) == ["plain test"]


@pytest.mark.parametrize("source", ["org/corpus", "corpus.parquet"])
def test_tables_need_the_library(monkeypatch, tmp_path, source):
    """Which brings what reads parquet."""
    (tmp_path / "corpus.parquet").write_bytes(b"PAR1")
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DBConvertError, match=rf"{source} needs the `datasets` library\n.*dbconvert\[data\]"):
        texts("all", source=source)


def test_a_hub_id_that_cannot_be_reached():
    with pytest.raises(DBConvertError, match=r"cannot read part train of org/corpus\n.*Hub.*\n.*check the name"):
        texts(source="org/corpus")


def test_a_stream_that_breaks_says_where(hub, monkeypatch):
    def broken(self):
        yield {"text": "one"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)
    with pytest.raises(DBConvertError, match=r"cannot read document 1 of part train of org/corpus\n.*gone"):
        texts(source="org/corpus", streaming=True)


def test_a_script_is_answered_with_its_converted_branch(monkeypatch):
    def refuse(path, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found corpus.py")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(DBConvertError, match=r"data.revision=refs/convert/parquet"):
        texts(source="org/corpus")


# -- functions, and bad input -----------------------------------------------------------------------------------


def test_a_function(tmp_path):
    (tmp_path / "d.py").write_text("def data(part): return [{'body': part + ' ' + str(i)} for i in range(2)]")
    assert texts("test", source="d.py:data", text="body") == ["test 0", "test 1"]
    assert fingerprint("test", source="d.py:data", text="body") != fingerprint(source="d.py:data", text="body")


@pytest.mark.parametrize(
    ("options", "part", "message"),
    [
        ({}, "train", "no data is given"),
        ({"source": "nowhere"}, "train", r"nowhere does not exist\n.*pydoc, a text file"),
        ({"source": "some/missing.jsonl"}, "train", "does not exist"),
        ({"source": "pydoc"}, "dev", "pydoc has no part dev"),
        ({"source": "a.txt"}, "dev", r"a.txt has no part dev\n.*90, 5 and 5 %"),
        ({"source": "a.txt"}, "train[:50]", r"has no part train\[:50\]\n.*a piece in per cent"),
        ({"source": "latin.txt"}, "train", r"latin.txt is not a text file in UTF-8\n.*0xe9 at position 2"),
        ({"source": "rows.jsonl"}, "train", r"no column text\n.*set data.text to one of: body, n"),
        ({"source": "rows.jsonl", "text": "n"}, "train", "column n of document 0 of .* holds int, not text"),
        ({"source": "broken.jsonl"}, "train", r"cannot read part train of broken.jsonl\n.*JSON"),
        ({"source": "digits"}, "train", r"no column text\n.*image, label"),
        ({"source": "pairs.py:data"}, "train", "are tuples, not dicts"),
        ({"source": "half.py:data"}, "train", r"document 0 of .* is not proper Unicode\n.*at character 1"),
        ({"source": "nothing"}, "train", "nothing holds no text"),
        ({"source": "repo"}, "dev", r'Unknown split "dev".*\n.*name the parts'),
    ],
)
def test_bad_text_is_told(tmp_path, options, part, message):
    Path("a.txt").write_text(TEXT)
    Path("latin.txt").write_bytes("caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin1")[1:] + b" text" * 9)
    Path("rows.jsonl").write_text('{"body": "one", "n": 1}\n{"body": "two", "n": 2}\n')
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("pairs.py").write_text("def data(part): return [(1, 2)]")
    Path("half.py").write_text("def data(part): return [{'text': 'a\\ud800'}]")
    Path("nothing").mkdir()
    save_repository(tmp_path / "repo")
    with pytest.raises((DBConvertError, UsageError), match=message):
        texts(part, **options)
