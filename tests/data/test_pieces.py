"""Pieces of parts, train[:90%] and train[100:], in every kind of source; streamed from a stand-in for the hub."""

import os
from itertools import chain
from pathlib import Path

import datasets
import fake_hub
import pytest
from commands import python

from dbconvert.data.parts import Slice, sliced
from dbconvert.data.text import open_documents
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError, UsageError

ROWS = [f"document {i}" for i in range(70)]
TEXT = "".join(f"line {i}\n" for i in range(300))
PIECES = ("train[:10%]", "train[10%:35%]", "train[35%:]")


def texts(part, **options):
    return list(open_documents(DataOptions(**options), part))


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.mark.parametrize(
    ("part", "meaning"),
    [
        ("train[:90%]", Slice("train", 0, 90, True)),
        ("train[5%:]", Slice("train", 5, None, True)),
        ("train[100:200]", Slice("train", 100, 200, False)),
        ("train[7:]", Slice("train", 7, None, False)),
        ("train", None),
        ("train[:]", None),
        ("train[5%:10]", None),
        ("train[%:10%]", None),
        ("train[-10:]", None),
        ("train[a:b]", None),
    ],
)
def test_what_names_of_pieces_mean(part, meaning):
    assert sliced(part) == meaning


@pytest.mark.parametrize("size", [0, 1, 7, 70, 1001])
def test_per_cent_count_documents_as_the_library_does(size):
    for part in PIECES:
        bounds = datasets.ReadInstruction.from_spec(part).to_absolute({"train": size})
        assert sliced(part).of(size) == range(bounds[0].from_, bounds[0].to)
    assert sliced("train[5:9]").of(size) == range(min(5, size), min(9, size))


def test_a_text_file_in_pieces():
    Path("a.txt").write_text(TEXT)
    parts = [texts(part, source="a.txt")[0] for part in PIECES]
    assert "".join(parts) == TEXT and [round(100 * len(part) / len(TEXT)) for part in parts] == [10, 25, 65]
    prints = {open_documents(DataOptions(source="a.txt"), part).fingerprint for part in (*PIECES, "train", "all")}
    assert len(prints) == 5


def test_a_folder_of_texts_in_pieces():
    for i in range(60):
        Path("f").mkdir(exist_ok=True)
        Path("f", f"{i}.txt").write_text(f"text {i}")
    parts = [texts(part, source="f") for part in PIECES]
    assert sorted(chain(*parts)) == sorted(f"text {i}" for i in range(60)) and [len(p) for p in parts] == [6, 15, 39]
    with pytest.raises(UsageError, match=r"f has no part train\[:10\]"):
        texts("train[:10]", source="f")


# -- over the network -------------------------------------------------------------------------------------------

TOLD = f"""---
dataset_info:
  features:
  - name: text
    dtype: string
  splits:
  - name: train
    num_bytes: 1000
    num_examples: {len(ROWS)}
---
"""
ASK = """
import os, sys
from dbconvert.data.text import open_documents
from dbconvert.data_options import DataOptions
options = DataOptions(source="org/corpus", streaming="streamed" in sys.argv, revision="refs/pr/1")
for part in sys.argv[2:]:
    print(part, *open_documents(options, part), sep="|", flush=True)
os._exit(0)  # threads of pyarrow that still read ahead of a stream left early abort a process on its way out
"""


@pytest.fixture
def ask(tmp_path):
    """What a process reads of org/corpus, part by part: [(part, texts)]."""
    root = tmp_path / "hub"
    (root / "data").mkdir(parents=True)
    for shard in range(2):
        table = datasets.Dataset.from_dict({"text": ROWS[shard * 40 : shard * 40 + 40]})
        table.to_parquet(root / "data" / f"train-0000{shard}-of-00002.parquet")
    with fake_hub.serving(root, tmp_path / "hf") as environment:

        def read(how, *parts, told=True):
            (root / "README.md").write_text(TOLD if told else "nothing")
            environment["HF_HOME"] = str(tmp_path / f"hf-{told}")
            done = python("-c", ASK, how, *parts, env={**os.environ, **environment})
            return {line.split("|")[0]: line.split("|")[1:] for line in done.stdout.splitlines()}

        yield read


def test_streamed_pieces_are_those_of_a_download(ask):
    parts = ("train", "train[5:9]", "train[66:]", *PIECES)
    streamed = ask("streamed", *parts)
    assert streamed == ask("downloaded", *parts)
    assert streamed["train"] == ROWS == list(chain(*(streamed[part] for part in PIECES)))
    assert streamed["train[5:9]"] == ROWS[5:9] and streamed["train[66:]"] == ROWS[66:]


def test_without_a_count_a_stream_is_cut_by_documents_only(ask):
    assert ask("streamed", "train[:3]", "train[68:]", told=False) == {"train[:3]": ROWS[:3], "train[68:]": ROWS[68:]}
    with pytest.raises(AssertionError, match=r"cannot tell where part train\[:1%\] of org/corpus begins or ends"):
        ask("streamed", "train[:1%]", told=False)


def test_pieces_from_the_end_are_told_when_streamed(monkeypatch):
    table = datasets.Dataset.from_dict({"text": ROWS})
    Path("repo").mkdir()
    table.to_parquet("repo/train.parquet")
    real = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, **options: real("repo"))
    with pytest.raises(DBConvertError, match=r"cannot read part train\[-3:\] of org/corpus\n.*Bad split"):
        texts("train[-3:]", source="org/corpus", streaming=True)
