"""Files appear whole or not at all, and nothing of anybody else's is replaced."""

import errno
import json
import pickle

import pytest
import torch

from dbconvert import checkpoint as ck
from dbconvert import files, weights
from dbconvert.errors import DBConvertError, UsageError


def some_tensors():
    return {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2).bfloat16()}


def test_round_trip_with_metadata(tmp_path):
    tensors = some_tensors()
    ck.save_tensors(tmp_path / "x.safetensors", tensors, {"key": "value"})
    loaded = ck.load_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors.items())
    assert ck.read_metadata(tmp_path / "x.safetensors")["key"] == "value"


def test_shards_and_index(tmp_path):
    tensors = {f"t{i}": torch.randn(100) for i in range(5)}
    path = ck.save_checkpoint(tmp_path / "m.safetensors", tensors, {"plan": "p"}, shard_bytes=900)
    assert path.name == "m.safetensors.index.json" and len(list(tmp_path.glob("m-*.safetensors"))) == 3
    loaded, metadata = ck.load_checkpoint(path)
    assert metadata["plan"] == "p" and all(torch.equal(loaded[k], v) for k, v in tensors.items())


def test_an_index_may_not_point_outside(tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"t": "../x.safetensors"}}))
    with pytest.raises(DBConvertError, match="outside"):
        ck.load_checkpoint(index)


def test_a_truncated_file_is_told(tmp_path):
    path = tmp_path / "x.safetensors"
    ck.save_tensors(path, some_tensors())
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DBConvertError, match="not a whole safetensors file"):
        ck.load_tensors(path)
    with pytest.raises(DBConvertError, match="does not exist"):
        ck.load_tensors(tmp_path / "none.safetensors")


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    ck.save_tensors(path, {"a": torch.zeros(2)})
    before = path.read_bytes()
    monkeypatch.setattr(ck, "write_items", full_disk)
    with pytest.raises(DBConvertError, match="no space left"):
        ck.save_tensors(path, some_tensors())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_only_if_it_is_ours(tmp_path):
    target = tmp_path / "out"
    with files.atomic_folder(target) as temporary:
        (temporary / "one").write_text("1")
    with pytest.raises(UsageError, match="exists already"), files.atomic_folder(target):
        pass
    with files.atomic_folder(target, force=True) as temporary:
        (temporary / "two").write_text("2")
    assert sorted(p.name for p in target.iterdir()) == [".dbconvert", "two"]
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not written by dbconvert"), files.atomic_folder(theirs, force=True):
        pass
    assert (theirs / "thesis.tex").exists()


def test_a_failed_folder_leaves_nothing(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(DBConvertError, match="no space left"), files.atomic_folder(target) as temporary:
        (temporary / "half").write_text("...")
        full_disk()
    assert list(tmp_path.iterdir()) == []


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_weights_are_never_unpickled(tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    assert torch.equal(weights.load_state_dict(tmp_path / "good.pt")["a"], torch.ones(2))
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "nested.pt")
    assert list(weights.load_state_dict(tmp_path / "nested.pt")) == ["a"]
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": 3}, tmp_path / "numbers.pt")
    for name in ("evil.pt", "evil.pkl", "numbers.pt", "missing.pt"):
        with pytest.raises(DBConvertError):
            weights.load_state_dict(tmp_path / name)
    assert "executed" not in capsys.readouterr().out
