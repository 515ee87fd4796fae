"""Tokenised text is made once, is whole or made again, and costs no memory."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dbconvert.data.documents import Documents
from dbconvert.data.token_cache import cache_folder, smallest, tokenised
from dbconvert.data.tokenizers import ByteTokenizer, CharTokenizer
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError


class Counted:
    """Documents that know how often they were read."""

    def __init__(self, texts, fingerprint="0"):
        self.texts, self.passes = texts, 0
        self.documents = Documents("some text", fingerprint, self.read)

    def read(self):
        self.passes += 1
        yield from self.texts


TEXTS = ["one", "", "two and three"]


def test_tokens_follow_each_other_and_ends_are_known(tmp_path):
    file = tokenised(Counted(TEXTS).documents, ByteTokenizer(), tmp_path)
    assert bytes(file.tokens) == b"one\ntwo and three\n" and file.ends.tolist() == [4, 18]
    entry = file.entry
    assert (entry.tokens, entry.documents, entry.characters, entry.empty) == (18, 2, 16, 1)
    assert isinstance(file.tokens, np.memmap) and not file.tokens.flags.writeable


@pytest.mark.parametrize(("size", "kind"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_the_smallest_type_that_fits(size, kind):
    assert smallest(size) == kind and np.iinfo(kind).max >= size - 1


def test_large_vocabularies_round_trip(tmp_path):
    characters = "".join(chr(c) for c in range(0x4E00, 0x4E00 + 1000))
    char = CharTokenizer(characters)
    file = tokenised(Counted([characters] * 3).documents, char, tmp_path)
    assert file.tokens.dtype == np.uint16 and char.decode(file.tokens[1000:2000]) == characters


def test_text_is_tokenised_once_for_every_content_and_tokenizer(tmp_path):
    source = Counted(TEXTS)
    for _ in range(2):
        tokenised(source.documents, ByteTokenizer(), tmp_path)
    assert source.passes == 1
    tokenised(source.documents, CharTokenizer("abc"), tmp_path)
    assert source.passes == 2
    other = Counted(["else"], fingerprint="1")
    assert bytes(tokenised(other.documents, ByteTokenizer(), tmp_path).tokens) == b"else\n" and other.passes == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".tokens", ".json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_entry_is_made_again(tmp_path, suffix, damage):
    source = Counted(TEXTS)
    path = tokenised(source.documents, ByteTokenizer(), tmp_path).path
    damage(path.with_suffix(suffix))
    again = tokenised(source.documents, ByteTokenizer(), tmp_path)
    assert source.passes == 2 and bytes(again.tokens) == b"one\ntwo and three\n"


def test_nothing_half_written_stays(tmp_path):
    def read():
        yield "one"
        raise RuntimeError("pulled plug")

    with pytest.raises(RuntimeError):
        tokenised(Documents("some text", "0", read), ByteTokenizer(), tmp_path)
    with pytest.raises(DBConvertError, match="some text holds no text"):
        tokenised(Counted(["", ""]).documents, ByteTokenizer(), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}


JOB = """
import sys, time
from pathlib import Path
from dbconvert.data.documents import Documents
from dbconvert.data.token_cache import tokenised
from dbconvert.data.tokenizers import ByteTokenizer

def read():
    with Path("passes").open("a") as file:
        file.write("x")
    time.sleep(1)
    yield "text"

print("ready", flush=True)
sys.stdin.readline()
print(bytes(tokenised(Documents("t", "0", read), ByteTokenizer(), Path("shared")).tokens))
"""


def test_of_two_processes_one_makes_the_tokens():
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        job.stdin.write("\n")
        job.stdin.flush()
    assert [job.communicate(timeout=60)[0] for job in jobs] == ["b'text\\n'\n"] * 2
    assert Path("passes").read_text() == "x"


def test_a_map_is_not_pickled(tmp_path):
    file = tokenised(Counted(["x" * 100_000]).documents, ByteTokenizer(), tmp_path)
    content = pickle.dumps(file)
    assert len(content) < 1000 and pickle.loads(content).tokens[0] == ord("x")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("DBCONVERT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder(DataOptions()) == Path("/xdg/dbconvert")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(DataOptions()) == Path.home() / ".cache" / "dbconvert"
    monkeypatch.setenv("DBCONVERT_CACHE", "/mine")
    assert cache_folder(DataOptions()) == Path("/mine")
    assert cache_folder(DataOptions(cache="here")) == Path("here")


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DBConvertError, match=r"cannot write .*file(\n.*)*data.cache="):
        tokenised(Counted(TEXTS).documents, ByteTokenizer(), tmp_path / "file")
