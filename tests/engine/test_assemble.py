"""assemble and load: one checkpoint from blocks that belong together, and back."""

import json
import shutil
from pathlib import Path

import commands
import fake_hub
import networks
import pytest
import torch
from engine.conftest import ALONE, QUICK, write_model

import dbconvert
from dbconvert.checkpoint import load_tensors, read_metadata, save_tensors
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.files import sha256_file
from dbconvert.recipe import SplitOptions


def copy_run(run, name):
    shutil.copytree(run.folder, name)
    return Path(name)


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_one_run_of_all_blocks(run_of_all):
    path = dbconvert.assemble([str(run_of_all.folder)])
    assert path == Path("model.safetensors") and Path("model.source/model.py").exists()
    metadata = read_metadata(path)
    assert json.loads(metadata["dbconvert.plan"])["blocks"] == [[0, 1], [2, 3], [4, 4]]
    assert {"dbconvert.noise", "dbconvert.data"} <= set(metadata)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(dbconvert.load(path)(images), dbconvert.load(run_of_all.folder)(images))


def test_several_runs_of_one_block(runs_of_one, package):
    folders = [str(run.folder) for run in runs_of_one]
    path = dbconvert.assemble(folders)
    joint = dbconvert.train(str(package), overrides=ALONE)
    other = dbconvert.assemble([str(joint.folder)], out="joint.safetensors")
    a, b = load_tensors(path), load_tensors(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(dbconvert.load(path)(images), dbconvert.load(joint.folder)(images))
    assert "dbconvert.periphery.2.head/weight" in a and "head.weight" not in a


def test_one_block_is_a_run_of_all_blocks(model_file):
    data = DataOptions(source="digits")
    split = dbconvert.split(str(model_file), out="one", options=SplitOptions(blocks=1), data=data)
    dbconvert.train(str(split.package), overrides=QUICK)
    assert dbconvert.load(dbconvert.assemble())(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_the_newest_complete_run_is_the_default(package):
    with pytest.raises(DBConvertError, match="no complete run"):
        dbconvert.assemble()
    dbconvert.train(str(package), overrides=QUICK)
    newest = dbconvert.train(str(package), overrides=[*QUICK, "seed=1"])
    dbconvert.train(str(package), overrides=ALONE, block=0)
    unfinished = dbconvert.train(str(package), overrides=QUICK)
    edit(unfinished.folder / "run.json", status="running")
    path = dbconvert.assemble()
    stored = load_tensors(newest.folder / "weights" / "periphery.safetensors")
    assert torch.equal(load_tensors(path)["head.weight"], stored["head.weight"])


def test_shards(run_of_all):
    index = dbconvert.assemble([str(run_of_all.folder)], shard_bytes=30_000)
    assert index.name == "model.safetensors.index.json" and len(list(Path().glob("model-*.safetensors"))) > 1
    images = torch.rand(3, 1, 8, 8)
    expected = dbconvert.load(run_of_all.folder)(images)
    assert torch.equal(dbconvert.load(index)(images), expected)
    assert torch.equal(dbconvert.load("model.safetensors")(images), expected)


def test_mixtures_are_refused_by_name(runs_of_one, run_of_all, package, model_file):
    one = [str(run.folder) for run in runs_of_one]
    for runs, message in (
        (one[:2], "block 2 is missing"),
        ([*one, one[0]], "block 0 is in both"),
        ([one[0], str(run_of_all.folder)], "shared periphery cannot be put together"),
    ):
        with pytest.raises(DBConvertError, match=message):
            dbconvert.assemble(runs)
    other_split = dbconvert.split(str(model_file), out="other", seed=1)
    overrides = [*ALONE, "data.source=digits"]
    stranger = dbconvert.train(str(other_split.package), overrides=overrides, block=2)
    with pytest.raises(DBConvertError, match="different splits"):
        dbconvert.assemble([*one[:2], str(stranger.folder)])
    shutil.copytree(package, "noisy")
    noise = json.loads(Path("noisy/noise.json").read_text())
    Path("noisy/noise.json").write_text(json.dumps({**noise, "overlap": 0.3}))
    louder = dbconvert.train("noisy", overrides=ALONE, block=2)
    with pytest.raises(DBConvertError, match="different noise fits"):
        dbconvert.assemble([*one[:2], str(louder.folder)])
    assert not list(Path().glob("model*"))


def test_damage_is_told(run_of_all):
    run = copy_run(run_of_all, "copy")
    block = run / "weights" / "block-1.safetensors"
    tensors, metadata = load_tensors(block), read_metadata(block)
    block.write_bytes(block.read_bytes()[:-3])
    with pytest.raises(DBConvertError, match="is damaged"):
        dbconvert.assemble([str(run)])
    save_tensors(block, {**tensors, "extra": torch.ones(1)}, metadata)
    digest = sha256_file(block)
    files = json.loads((run / "run.json").read_text())["files"]
    edit(run / "run.json", files={**files, "block-1.safetensors": digest})
    with pytest.raises(DBConvertError, match="1 unknown"):
        dbconvert.assemble([str(run)])
    key = next(iter(tensors))
    save_tensors(block, {**tensors, key: tensors[key][:1].clone()}, metadata)
    digest = sha256_file(block)
    edit(run / "run.json", files={**files, "block-1.safetensors": digest})
    with pytest.raises(DBConvertError, match="and the split says"):
        dbconvert.assemble([str(run)])
    save_tensors(block, tensors, {"dbconvert.plan": "another"})
    digest = sha256_file(block)
    edit(run / "run.json", files={**files, "block-1.safetensors": digest})
    with pytest.raises(DBConvertError, match="another split than its run"):
        dbconvert.assemble([str(run)])
    block.unlink()
    with pytest.raises(DBConvertError, match="is missing"):
        dbconvert.assemble([str(run)])
    edit(run / "run.json", status="running")
    with pytest.raises(DBConvertError, match="is not complete"):
        dbconvert.assemble([str(run)])
    assert not list(Path().glob("model*"))


def test_trained_blocks_do_not_go_back(run_of_all, package):
    with pytest.raises(UsageError, match="is a package, whose blocks are not trained"):
        dbconvert.assemble([str(package)], out="back")
    with pytest.raises(UsageError, match="turns one package back"):
        dbconvert.assemble(original=True, out="back")
    with pytest.raises(DBConvertError, match="was trained") as caught:
        dbconvert.assemble([str(run_of_all.folder)], original=True, out="back")
    assert "turn back the package" in caught.value.hint and not Path("back").exists()


def test_existing_files_are_kept(run_of_all):
    runs = [str(run_of_all.folder)]
    dbconvert.assemble(runs)
    before = Path("model.safetensors").stat()
    with pytest.raises(UsageError, match="exists already"):
        dbconvert.assemble(runs)
    assert Path("model.safetensors").stat() == before
    dbconvert.assemble(runs, force=True)
    assert Path("model.safetensors").stat().st_mtime_ns > before.st_mtime_ns
    Path("model.safetensors").unlink()
    dbconvert.assemble(runs)  # the source that is still there is the same
    Path("other.source").mkdir()
    Path("other.source/mine.txt").touch()
    with pytest.raises(UsageError, match="not written by dbconvert"):
        dbconvert.assemble(runs, out="other.safetensors", force=True)
    assert Path("other.source/mine.txt").exists() and not Path("other.safetensors").exists()
    save_tensors(Path("theirs.safetensors"), {"a": torch.ones(1)})
    with pytest.raises(UsageError, match="not written by dbconvert"):
        dbconvert.assemble(runs, out="theirs.safetensors", force=True)
    with pytest.raises(UsageError, match="does not end in"):
        dbconvert.assemble(runs, out="model.bin")


def test_load_wants_the_source_that_was_split(run_of_all, model_file):
    dbconvert.assemble([str(run_of_all.folder)])
    images = torch.rand(2, 1, 8, 8)
    expected = dbconvert.load("model.safetensors")(images)
    shutil.rmtree("model.source")
    with pytest.raises(DBConvertError, match=r"source model.py is missing"):
        dbconvert.load("model.safetensors")
    assert torch.equal(dbconvert.load("model.safetensors", model_file)(images), expected)
    shutil.copy(model_file, "model.py")
    assert torch.equal(dbconvert.load("model.safetensors")(images), expected)
    Path("model.py").write_text(Path("model.py").read_text() + "\nraise SystemExit('executed')\n")
    with pytest.raises(DBConvertError, match="content has changed"):
        dbconvert.load("model.safetensors")


def test_other_files_are_not_checkpoints(tmp_path):
    save_tensors(Path("plain.safetensors"), {"a": torch.ones(1)})
    with pytest.raises(UsageError, match="carries no plan"):
        dbconvert.load("plain.safetensors")
    save_tensors(Path("newer.safetensors"), {"a": torch.ones(1)}, {"dbconvert.plan": '{"schema_version": 9}'})
    with pytest.raises(DBConvertError, match="schema version 9"):
        dbconvert.load("newer.safetensors")
    with pytest.raises(DBConvertError, match=r"runs/nothing\.safetensors does not exist"):
        dbconvert.load("runs/nothing.safetensors")  # no hub id
    with pytest.raises(UsageError, match="neither a checkpoint nor a run"):
        dbconvert.load(tmp_path)


def test_a_transformers_checkpoint_needs_no_source(tmp_path):
    networks.vit_config().save_pretrained(tmp_path / "vit")
    (tmp_path / "d.py").write_text(
        "import torch\ndef data(part):\n"
        "    return [{'pixel_values': torch.rand(3, 16, 16), 'label': i % 5} for i in range(20)]\n"
    )
    result = dbconvert.split(str(tmp_path / "vit"), out="p")
    overrides = [*QUICK, "data.source=d.py:data", "train.batch=8"]
    run = dbconvert.train(str(result.package), overrides=overrides)
    path = dbconvert.assemble()
    shutil.rmtree("p")
    assert not Path("model.source").exists()
    assert dbconvert.load(path)(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    with pytest.raises(UsageError, match="give the data"):
        dbconvert.evaluate(str(path))
    found = dbconvert.evaluate(str(path), overrides=["data.source=d.py:data", "eval.draws=2"])
    assert found.examples == 20 and run.folder.exists()


def test_prediction_options(run_of_all):
    loaded = dbconvert.load(run_of_all.folder)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(images), loaded({"images": images}))
    assert loaded(images, steps=7).shape == (2, 10)
    torch.manual_seed(0)
    assert not torch.equal(loaded(images, begin="noise"), loaded(images, begin="noise"))


def test_single_block_runs_are_evaluated_by_their_losses(runs_of_one):
    found = dbconvert.evaluate(str(runs_of_one[1].folder), overrides=["eval.sigmas=3"])
    assert "loss_block_1" in found.metrics and "accuracy_zero" not in found.metrics


def test_a_repository_s_python_files_are_not_run_unasked(tmp_path):
    path = write_model(tmp_path / "m")
    (tmp_path / "m" / "neighbour.py").write_text("WIDTH = 16\n")
    path.write_text(path.read_text().replace("width=16", "width=__import__('neighbour').WIDTH"))
    dbconvert.split(str(path), out="p", data=DataOptions(source="digits"))
    dbconvert.train("p", overrides=QUICK)
    dbconvert.assemble(out="out")
    (tmp_path / "script.py").write_text(
        "import sys, torch, dbconvert\n"
        "print(tuple(dbconvert.load('some/vit', trust='--trust' in sys.argv)(torch.rand(2, 1, 8, 8)).shape))\n"
    )
    with fake_hub.serving(tmp_path / "out", tmp_path / "cache") as environment:
        refused = commands.python("script.py", env=environment, code=1)
        assert "not run unasked" in refused.stderr
        assert commands.python("script.py", "--trust", env=environment).stdout.strip() == "(2, 10)"
