"""Training: independent, resumable to the bit, loud when something is wrong."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import commands
import pytest
import torch
from engine.conftest import ALONE, QUICK

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.engine.convert import single_block, whole_network
from dbconvert.engine.outline import outline
from dbconvert.engine.package import open_package
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Advance, Note, Stage
from dbconvert.recipe import SplitOptions


def metrics(run, key="loss"):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def weights(run):
    return {p.name: load_tensors(p) for p in (Path(run) / "weights").iterdir()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_weights_metrics_and_its_recipe(run_of_all):
    folder = run_of_all.folder
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "complete" and info["blocks"] == [0, 1, 2] and info["updates"] == 12
    assert len(metrics(folder)) == 12 and sorted(set(metrics(folder, "block"))) == [0, 1, 2]
    assert {"accuracy_zero", "accuracy_draw", "loss_block_2"} <= set(run_of_all.metrics)
    assert not (folder / "checkpoints").exists()


def test_every_block_and_the_periphery_move(run_of_all, package):
    before, after = open_package(package).tensors(), weights(run_of_all.folder)
    merged = {k: v for tensors in after.values() for k, v in tensors.items()}
    moved = {k for k in merged if not torch.equal(merged[k], before[k])}
    for prefix in (
        "layers.0.",
        "layers.4.",
        "dbconvert.modulation.2.",
        "dbconvert.embedder.1.",
        "head.",
        "patches.",
        "dbconvert.target.",
    ):
        assert any(key.startswith(prefix) for key in moved), prefix


def test_training_again_gives_the_same_weights(run_of_all, package):
    again = dbconvert.train(str(package), overrides=QUICK)
    assert metrics(again.folder) == metrics(run_of_all.folder)
    for name, tensors in weights(run_of_all.folder).items():
        assert same(tensors, weights(again.folder)[name])


def test_single_jobs_equal_the_joint_run_to_the_bit(package, runs_of_one):
    joint = dbconvert.train(str(package), overrides=ALONE)
    for block, alone in enumerate(runs_of_one):
        assert same(
            weights(joint.folder)[f"block-{block}.safetensors"],
            weights(alone.folder)[f"block-{block}.safetensors"],
        )
        assert [*weights(alone.folder)] and "dbconvert.target.weight" in weights(alone.folder)["periphery.safetensors"]
    target = open_package(package).tensors()["dbconvert.target.weight"]
    assert torch.equal(weights(joint.folder)["periphery.safetensors"]["dbconvert.target.weight"], target)


def test_a_single_block_holds_nothing_of_the_others(package):
    opened = open_package(package)
    alone = single_block(opened.plan, opened.source(), 1, opened.tensors(block=1))
    whole = whole_network(opened.plan, opened.source())
    whole.load(opened.tensors(), where="package")
    names = [name for name, _ in alone.model.named_parameters()]
    assert {opened.plan.anatomy.layer_of(n) for n in names if not n.startswith("dbconvert.")} == {2, 3, None}
    assert not any(p.is_meta for p in alone.model.parameters())
    assert {n.split(".")[2] for n in names if n.startswith("dbconvert.embedder.")} == {"1"}
    args = {"images": torch.randn(2, 1, 8, 8)}, torch.randn(2, 16), torch.full((2,), 0.5)
    assert torch.equal(alone.eval().denoise(1, *args), whole.eval().denoise(1, *args))
    with pytest.raises(DBConvertError, match="block 0 is not in memory"):
        alone.denoise(0, *args)


def test_only_the_active_block_gets_gradients(package):
    opened = open_package(package)
    network = whole_network(opened.plan, opened.source())
    network.load(opened.tensors(), where="package")
    for name, parameter in network.model.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    output = network(
        1,
        {"images": torch.randn(2, 1, 8, 8)},
        torch.tensor([1, 2]),
        torch.full((2,), 0.5),
        torch.randn(2, 16),
    )
    output.sum().backward()
    touched = {network.owner(name) for name, p in network.model.named_parameters() if p.grad is not None}
    assert touched == {1, None}


@pytest.mark.parametrize("periphery", ["shared", "frozen-target"])
def test_a_killed_run_resumes_to_the_bit(package, tmp_path, periphery):
    recipe = [
        *QUICK,
        "train.steps=12",
        "train.checkpoint_every=5",
        f"train.periphery={periphery}",
        "optimizer.schedule=linear",
    ]
    straight = dbconvert.train(str(package), overrides=recipe, out="straight")
    process = subprocess.Popen(
        [commands.COMMAND, "train", str(package), *recipe, "-o", "killed"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and (not path.exists() or len(path.read_text().splitlines()) < 13):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["status"] == "running"
    stopped_at = len(path.read_text().splitlines())
    assert 13 <= stopped_at < 36
    resumed = dbconvert.train(str(package), overrides=recipe, resume=True, out="killed")
    assert metrics(resumed.folder) == metrics(straight.folder)
    for name, tensors in weights(straight.folder).items():
        assert same(tensors, weights(resumed.folder)[name])


def test_resume_finds_the_run_and_refuses_another_recipe(package):
    with pytest.raises(DBConvertError, match="no unfinished run"):
        dbconvert.train(str(package), overrides=QUICK, resume=True)
    done = dbconvert.train(str(package), overrides=QUICK)
    with pytest.raises(UsageError, match="is complete"):
        dbconvert.train(str(package), overrides=QUICK, resume=True, out=str(done.folder))
    info, before = json.loads((done.folder / "run.json").read_text()), metrics(done.folder)
    (done.folder / "run.json").write_text(json.dumps({**info, "status": "running", "files": {}}))
    again = dbconvert.train(str(package), resume=True)  # with its own recipe: nothing has to be said twice
    assert again.folder == done.folder and metrics(again.folder) == before
    (done.folder / "run.json").write_text(json.dumps({**info, "status": "running", "files": {}}))
    with pytest.raises(UsageError, match="optimizer differ"):
        dbconvert.train(str(package), overrides=[*QUICK, "optimizer.lr=1"], resume=True)
    with pytest.raises(DBConvertError, match="no unfinished run of block 1 alone"):
        dbconvert.train(str(package), overrides=ALONE, block=1, resume=True)
    with pytest.raises(UsageError, match="does not train what is asked"):
        dbconvert.train(str(package), overrides=ALONE, block=1, resume=True, out=str(done.folder))
    assert dbconvert.train(str(package), overrides=[*QUICK, "log.every=2"], resume=True).folder == done.folder
    with pytest.raises(UsageError, match="exists already"):
        dbconvert.train(str(package), overrides=QUICK, out=str(done.folder))


def test_data_that_the_network_cannot_run_is_told(package, tmp_path):
    (tmp_path / "d.py").write_text(
        "import torch\n"
        "def data(part):\n    return [{'image': torch.zeros(1, 6, 8), 'label': i % 10} for i in range(8)]\n"
    )
    data = ["data.source=d.py:data", "train.batch=8", "data.validation=null"]
    with pytest.raises(DBConvertError, match="fails on a batch of the data") as caught:
        dbconvert.train(str(package), overrides=[*QUICK, *data], out="run")
    assert "[8, 1, 6, 8]" in caught.value.where and "[2, 1, 8, 8]" in caught.value.where
    assert "data.image.size=8 resizes" in caught.value.hint and "mode=L reads" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_runs_are_numbered(package):
    names = [dbconvert.train(str(package), overrides=[*QUICK, "train.steps=1"]).folder.name for _ in range(2)]
    assert names == ["small-001", "small-002"]


def test_a_loss_that_is_not_finite_stops_the_run(package, tmp_path):
    (tmp_path / "d.py").write_text(
        "import torch\n"
        "class Data(list): pass\n"
        "def data(part):\n"
        "    bad = torch.full((1, 8, 8), float('nan'))\n"
        "    return Data({'image': bad if i == 3 else torch.zeros(1, 8, 8), 'label': i % 10} for i in range(8))\n"
    )
    data = ["data.source=d.py:data", "train.batch=8", "data.validation=null"]
    with pytest.raises(DBConvertError, match="not finite for 1 of 8") as caught:
        dbconvert.train(str(package), overrides=[*QUICK, *data], out="run")
    assert "block-" in caught.value.where and "sigma" in caught.value.where and "update 1" in caught.value.where
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"


@pytest.mark.parametrize(
    ("overrides", "block", "message"),
    [
        (QUICK, 1, "shared periphery"),
        (ALONE, 7, "no block 7"),
        ([*ALONE, "train.method=shallow"], 0, "does not train single blocks"),
        (["train.epochs=null"], None, "how long to train"),
        ([*QUICK, "data.source=null"], None, "no data is given"),
        ([*QUICK, "data.validation=rehearsal"], None, "no part rehearsal"),
        ([*QUICK, "split.blocks=2"], None, "split was decided"),
        ([*QUICK, "task=telepathy"], None, "is not the package's"),
    ],
)
def test_impossible_jobs_are_refused(package, tmp_path, overrides, block, message):
    with pytest.raises(UsageError, match=message):
        dbconvert.train(str(package), overrides=overrides, block=block)
    assert not list(tmp_path.glob("runs/*/weights"))


def test_damaged_package_weights_are_told(package, tmp_path):
    import shutil

    shutil.copytree(package, tmp_path / "p")
    path = tmp_path / "p" / "weights" / "block-1.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DBConvertError, match="its content differs"):
        dbconvert.train("p", overrides=QUICK)
    path.unlink()
    with pytest.raises(DBConvertError, match="does not exist"):
        dbconvert.train("p", overrides=QUICK)
    with pytest.raises(UsageError, match="not a package"):
        dbconvert.train(str(tmp_path))


def test_accumulation_is_one_batch_in_parts(package):
    whole = dbconvert.train(str(package), overrides=[*QUICK, "train.steps=1"])
    parts = dbconvert.train(str(package), overrides=[*QUICK, "train.steps=1", "train.accumulate=4"])
    assert metrics(parts.folder, "grad_norm")[0] != 0
    a, b = (weights(run.folder)["periphery.safetensors"]["head.weight"] for run in (whole, parts))
    assert torch.allclose(a, b, atol=1e-4) and parts.memory.units[0].activations < whole.memory.units[0].activations / 2


@pytest.mark.parametrize(
    "extra",
    [
        ["train.precision=bf16"],
        ["optimizer.name=sgd"],
        ["train.weight=edm"],
        ["train.order=rotate", "train.steps_per_turn=2"],
        ["data.flip=true", "data.randaugment.operations=1", "data.image.size=8"],
        ["data.workers=1"],
        ["train.clip=null", "optimizer.schedule=constant"],
    ],
)
def test_options_train(package, extra):
    result = dbconvert.train(str(package), overrides=[*QUICK, "train.steps=2", *extra])
    assert all(torch.tensor(metrics(result.folder)).isfinite())


def test_trackers(package):
    overrides = [*QUICK, "train.steps=1", "log.trackers=[wandb, tensorboard]"]
    done = commands.dbconvert(
        "train", package, *overrides, "-o", "run", env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    )
    assert "finished" in done.stdout
    assert list(Path("run").rglob("events.out.tfevents*"))
    assert list(Path().rglob("offline-run-*"))


def test_baselines_train_the_original_network(package):
    whole = dbconvert.train(str(package), overrides=[*QUICK, "train.method=end-to-end"])
    shallow = dbconvert.train(str(package), overrides=[*QUICK, "train.method=shallow"])
    before = open_package(package).tensors()

    def moved(run):
        after = weights(run.folder)["network.safetensors"]
        return {k for k in after if not torch.equal(after[k], before[k])}

    layers = open_package(package).plan.anatomy.layer_of
    assert {layers(k) for k in moved(whole)} == {None, 0, 1, 2, 3, 4}
    assert {layers(k) for k in moved(shallow)} == {None, 0, 1}
    assert not any(k.startswith("dbconvert.") for k in moved(whole) | moved(shallow))
    assert len(metrics(whole.folder)) == 4 and len(metrics(shallow.folder)) == 12
    assert dbconvert.evaluate(str(shallow.folder)).metrics["accuracy"] > 0


def test_outline_measures_and_writes_nothing(package, tmp_path):
    planned = outline(str(package), overrides=QUICK)
    assert planned.length == "4 updates a block" and len(planned.memory.units) == 3 and not list(tmp_path.iterdir())
    whole = outline(str(package), overrides=[*QUICK, "train.method=end-to-end"])
    assert planned.controls["end-to-end"] == whole.memory and not whole.controls
    one, all_of_it, shallow = planned.memory.units[2], whole.memory.units[0], planned.controls["shallow"].units[0]
    assert one.activations < 0.4 * all_of_it.activations and one.state < 0.65 * all_of_it.state
    assert shallow.activations < 0.6 * all_of_it.activations
    alone = outline(str(package), overrides=ALONE, block=2)
    assert alone.memory.resident_parameters < 0.6 * planned.memory.resident_parameters and not alone.controls


def test_outline_needs_no_data(model_file):
    split = dbconvert.split(str(model_file), out="bare", options=SplitOptions(blocks=3))
    planned = outline("bare", overrides=["train.batch=32"])
    assert planned.length == "100 epochs a block" and planned.noise == split.plan.preview
    same = outline("bare", overrides=["train.batch=32", "data.source=digits"])
    assert same.length == "100 epochs, 3700 updates a block" and same.noise != planned.noise
    assert same.memory == planned.memory and same.controls == planned.controls
    with pytest.raises(UsageError, match="no data is given"):
        dbconvert.train("bare")


def test_a_recipe_starts_from_a_source(tmp_path, model_file):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(f"source: {model_file}\nsplit: {{blocks: 2}}\ndata: {{source: digits}}\ntrain: {{steps: 2}}\n")
    result = dbconvert.train(str(recipe), overrides=["train.batch=16"])
    assert result.folder == Path("runs/small-001") and (result.folder / "package" / "plan.json").exists()
    (result.folder / "run.json").write_text((result.folder / "run.json").read_text().replace('"complete"', '"running"'))
    assert dbconvert.train(str(recipe), overrides=["train.batch=16"], resume=True).folder == result.folder


def test_progress_is_reported(package):
    events = []
    dbconvert.train(str(package), overrides=QUICK, report=events.append)
    stages = [e for e in events if isinstance(e, Stage)]
    assert [s.total for s in stages if s.name == "training"] == [12]
    assert sum(e.steps for e in events if isinstance(e, Advance)) == 12
    assert not [e for e in events if isinstance(e, Note) and e.warning]


def test_a_noise_fit_made_by_a_block_job_stays_in_the_package(tmp_path, model_file):
    dbconvert.split(str(model_file), out="p")
    overrides = [*ALONE, "data.source=digits", "train.steps=1"]
    first = dbconvert.train("p", overrides=overrides, block=0)
    kept = (tmp_path / "p" / "noise.json").read_text()
    second = dbconvert.train("p", overrides=overrides, block=1)
    assert kept == (first.folder / "noise.json").read_text() == (second.folder / "noise.json").read_text()


@pytest.mark.slow
def test_accelerate_launches_the_packages_script(package, tmp_path):
    command = [str(Path(commands.COMMAND).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, str(package / "train.py"), *QUICK, "-o", "run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"
