"""Weights that do not fit, are damaged or lead elsewhere: one message, and nothing left behind."""

import errno
import json
import os
import struct
from pathlib import Path

import families
import networks
import pytest
import torch
from safetensors.torch import load_file, save_file

import dbconvert
from dbconvert import stream
from dbconvert.errors import DBConvertError
from dbconvert.recipe import SplitOptions

TWO = SplitOptions(blocks=2)
pytestmark = pytest.mark.usefixtures("quick_splits")


@pytest.fixture
def llama(tmp_path):
    """A folder of Llama in three shards or so."""
    families.save("llama", tmp_path / "m", max_shard_size="60KB")
    return tmp_path / "m"


def one_file(folder, name="llama"):
    families.save(name, folder)
    return folder / "model.safetensors"


def refused(folder, message):
    """The error of splitting a folder; nothing but the folder may be there afterwards."""
    before = sorted(path for path in Path().rglob("*"))
    with pytest.raises(DBConvertError, match=message) as caught:
        dbconvert.split(str(folder), out="p", options=TWO)
    assert sorted(path for path in Path().rglob("*")) == before
    return caught.value


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_missing_extra_and_misshapen_tensors_are_listed(tmp_path):
    file = one_file(tmp_path / "m")

    def change(tensors):
        for i in range(3):
            del tensors[f"model.layers.{i}.mlp.up_proj.weight"]
            tensors[f"model.layers.{i}.extra"] = torch.ones(2)
        tensors["model.norm.weight"] = torch.ones(7)
        tensors["lm_head.weight"] = torch.ones(3, 5)

    rewrite(file, change)
    error = refused(tmp_path / "m", "do not fit")
    assert "3 missing: model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight" in error.why
    assert "3 unknown: model.layers.0.extra" in error.why
    assert "2 of another shape: lm_head.weight (has [3, 5], wants [61, 32]), model.norm.weight" in error.why
    rewrite(file, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers" in key])
    assert "and 32 more" in refused(tmp_path / "m", "do not fit").why


def test_extra_tensors_can_be_left_out(tmp_path):
    """BERT on the hub comes with the head of a second objective, which its masked language model does not have."""
    file = one_file(tmp_path / "m", "bert")
    rewrite(file, lambda tensors: tensors.update({"cls.seq_relationship.weight": torch.ones(2, 32)}))
    assert "--drop-extra" in refused(tmp_path / "m", "do not fit").hint
    told = []
    result = dbconvert.split(str(tmp_path / "m"), out="p", options=TWO, drop_extra=True, report=told.append)
    assert any("cls.seq_relationship.weight" in getattr(event, "text", "") for event in told)
    stored = [key for path in (result.package / "weights").iterdir() for key in load_file(path)]
    assert "cls.seq_relationship.weight" not in stored and "bert.embeddings.word_embeddings.weight" in stored


def test_a_missing_expert_is_named(tmp_path):
    file = one_file(tmp_path / "m", "mixtral")
    expert = "model.layers.1.block_sparse_moe.experts.2"
    rewrite(file, lambda tensors: tensors.pop(f"{expert}.w1.weight"))
    assert refused(tmp_path / "m", "cannot be put together").why == f"missing: {expert}.w1.weight"
    rewrite(file, lambda tensors: tensors.pop(f"{expert}.w3.weight"))
    error = refused(tmp_path / "m", "cannot be put together")
    assert error.why == f"missing: {expert}.w1.weight, {expert}.w3.weight"


def test_an_untied_copy_of_a_tied_tensor_is_refused(tmp_path):
    file = one_file(tmp_path / "m", "llama_tied")
    rewrite(file, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    assert "tie_word_embeddings" in refused(tmp_path / "m", "are one tensor in the network").hint
    rewrite(file, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    dbconvert.split(str(tmp_path / "m"), out="p", options=TWO)


def headed(header, data):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file has 0"),
        (b"\x10", "the file has 1"),
        (struct.pack("<Q", 1 << 40) + b"{}", "should have 1,099,511,627,776 bytes"),
        (headed(b"not json", b""), "cannot be read"),
        (headed(b"[1, 2]", b""), "cannot be read"),
        (headed({"a": {"dtype": "F32"}}, b"1234"), "cannot be read"),
        (headed({"a": entry(0, 4, dtype="F33")}, b"1234"), "unknown kind of number F33"),
        (headed({"a": entry(0, 8)}, b"12345678"), "8 bytes for F32 of shape"),
        (headed({"a": entry(-4, 0)}, b"1234"), "offsets -4 to 0"),
        (headed({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "overlap or leave gaps"),
        (headed({"a": entry(4, 8)}, b"12345678"), "overlap or leave gaps"),
        (headed({"a": entry(0, 4)}, b"123"), "should end at byte"),
        (headed({"a": entry(0, 4)}, b"12345"), "should end at byte"),
    ],
)
def test_damaged_headers(tmp_path, content, why):
    file = one_file(tmp_path / "m")
    file.write_bytes(content)
    assert why in refused(tmp_path / "m", "not a whole safetensors file").why


def test_a_truncated_shard_is_told_before_anything_is_written(llama):
    shard = sorted(llama.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 5)
    assert shard.name in refused(llama, "not a whole safetensors file").message
    shard.unlink()
    refused(llama, "does not exist")


def test_an_index_that_is_none(llama):
    index = llama / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        refused(llama, "is not an index")
    name = next(llama.glob("model-*.safetensors")).name
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"nowhere": name}}))
    refused(llama, "tensors that its shards lack: nowhere")


def test_paths_and_links_may_not_leave_the_folder(llama, tmp_path):
    index = llama / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = llama / next(iter(content["weight_map"].values()))
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(shard.read_bytes())
    for name in ("../outside.safetensors", str(outside)):
        changed = {key: name if value == shard.name else value for key, value in content["weight_map"].items()}
        index.write_text(json.dumps({**content, "weight_map": changed}))
        refused(llama, "outside of its folder")
    index.write_text(json.dumps(content))
    shard.unlink()
    shard.symlink_to(outside)
    refused(llama, "outside of its folder")
    shard.unlink()
    shard.write_bytes(outside.read_bytes())
    (llama / "tokenizer.json").symlink_to("/etc/passwd")
    refused(llama, "tokenizer.json leads outside")


def test_the_hub_cache_s_own_links_are_fine(llama, tmp_path):
    """models--org--name/snapshots/COMMIT/FILE links to models--org--name/blobs/HASH."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(llama.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    result = dbconvert.split(str(snapshot), out="p", options=TWO)
    assert result.plan.pretrained and not (result.package / "model" / "config.json").is_symlink()


def test_quantised_weights_are_refused(tmp_path):
    file = one_file(tmp_path / "m")
    key = "model.layers.0.mlp.up_proj.weight"
    rewrite(file, lambda tensors: tensors.update({key: tensors[key].to(torch.float8_e4m3fn)}))
    error = refused(tmp_path / "m", "are quantised: 1 tensors hold F8_E4M3")
    assert error.where == key and "16 bit" in error.hint
    rewrite(file, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    refused(tmp_path / "m", "quantised: 1 tensors hold I8")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    )
    refused(tmp_path / "m", r"are quantised \(fp8\)")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickles_are_never_run(tmp_path, capsys):
    networks.llama_config().save_pretrained(tmp_path / "m")
    torch.save({"a": torch.ones(3).to_sparse()}, tmp_path / "m" / "pytorch_model.bin")
    assert "no plain tensor" in refused(tmp_path / "m", "a in").message
    torch.save({"a": Evil()}, tmp_path / "m" / "pytorch_model.bin")
    assert "never unpickled" in refused(tmp_path / "m", "cannot read").why
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "weights.pth", "model.gguf", "tf_model.h5"])
def test_weights_of_other_names_are_not_taken_for_none(tmp_path, name):
    networks.llama_config().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / name).touch()
    assert name in refused(tmp_path / "m", "names that are not read").message


def test_a_full_disk_leaves_nothing(llama, monkeypatch):
    written = []

    def full(source, target, at, size):
        written.append(size)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.copy_file_range(source.fileno(), target.fileno(), size, at)

    monkeypatch.setattr(stream, "copied_by_kernel", full)
    refused(llama, "no space left on the disk")
    monkeypatch.undo()
    monkeypatch.chdir(llama.parent)
    dbconvert.split(str(llama), out="p", options=TWO)
    written.clear()
    monkeypatch.setattr(stream, "copied_by_kernel", full)
    before = sorted(Path().rglob("*"))
    for out in ("back", "back.safetensors"):
        written.clear()
        with pytest.raises(DBConvertError, match="no space left"):
            dbconvert.assemble(["p"], original=True, out=out, shard_bytes=20_000)
        assert sorted(Path().rglob("*")) == before


def test_where_the_kernel_cannot_copy_it_is_done_by_hand(llama, monkeypatch):
    dbconvert.split(str(llama), out="p", options=TWO)
    monkeypatch.setattr(stream, "copied_by_kernel", lambda *_: None)
    dbconvert.split(str(llama), out="q", options=TWO)
    for file in Path("p/weights").iterdir():
        assert file.read_bytes() == (Path("q/weights") / file.name).read_bytes()
