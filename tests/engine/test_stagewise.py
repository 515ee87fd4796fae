"""Blocks that train one after the other: in one run, and as jobs of their own on what is finished."""

import json
import shutil

import pytest
import torch
from small_dit import write_model

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.data.batches import block_order
from dbconvert.engine.loop import Loop
from dbconvert.engine.outline import outline
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.recipe import SplitOptions

pytestmark = pytest.mark.usefixtures("one_thread", "quick_splits")
VIT = "def build_model():\n    return ViT(size=8, patch=4, channels=1, classes=10, depth=3, width=16, heads=2)\n"
QUICK = [
    "data.source=digits", "train.steps=3", "train.batch=16", "log.every=1", "eval.draws=1", "eval.sigmas=2",
    "train.checkpoint_every=2",
]  # fmt: skip
STAGES = [*QUICK, "train.order=stagewise"]
ALONE = [*QUICK, "train.periphery=frozen-target"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Packages of a small ViT and a small DiT that hear features, and a ViT that hears nothing."""
    from dbconvert.shipped import shipped

    folder = tmp_path_factory.mktemp("stages")
    text = shipped("examples/vit.py").read_text()
    (folder / "vit.py").write_text(text[: text.index("def build_model")] + VIT)
    write_model(folder / "d")
    for name, source, context in (
        ("features", folder / "vit.py", "features"),
        ("raw", folder / "vit.py", "raw"),
        ("dit", folder / "d" / "model.py", "estimate"),
    ):
        dbconvert.split(str(source), out=str(folder / name), options=SplitOptions(blocks=3, context=context))
    return folder


def train(place, name, out, *overrides, **more):
    return dbconvert.train(str(place / name), overrides=overrides, out=str(out), **more)


def weights(made):
    return {path.name: load_tensors(path) for path in sorted((made.folder / "weights").iterdir())}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def pulled_at(monkeypatch, update):
    whole = Loop.update

    def pulled(self, block, batch):
        if self.updates == update:
            raise KeyboardInterrupt
        return whole(self, block, batch)

    monkeypatch.setattr(Loop, "update", pulled)


# -- one run ------------------------------------------------------------------------------------------------------


def test_the_order_of_stages():
    assert block_order([0, 1, 2], 2, "stagewise", 1, 0) == [0, 0, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def staged(place, tmp_path_factory):
    return train(place, "features", tmp_path_factory.mktemp("run") / "r", *STAGES, "train.z=mixed")


def test_a_block_trains_on_what_is_finished(place, staged, tmp_path, monkeypatch):
    """Once a block's stage is over, neither it nor the periphery moves any more."""
    after = {}
    whole = Loop.update

    def watched(self, block, batch):
        found = whole(self, block, batch)
        state = {k: v.detach().clone() for k, v in self.job.network.tensors().items()}
        after[self.updates] = block, state, self.job.network.owner
        return found

    monkeypatch.setattr(Loop, "update", watched)
    made = train(place, "features", tmp_path / "r", *STAGES, "train.z=mixed")
    assert [block for block, *_ in after.values()] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    (_, first, owner), (_, middle, _), (_, last, _) = after[2], after[5], after[8]
    changed = {owner(key) for key in first if not torch.equal(first[key], middle[key])}
    assert changed == {1} and {owner(key) for key in last if not torch.equal(middle[key], last[key])} == {2}
    assert all(same(a, b) for a, b in zip(weights(made).values(), weights(staged).values(), strict=True))
    units = {unit.name: unit.trainable for unit in made.memory.units}
    assert units["block-0"] > units["block-1"]


@pytest.mark.parametrize("update", [1, 5, 7])
def test_interrupted_and_resumed_to_the_bit(place, staged, tmp_path, monkeypatch, update):
    with monkeypatch.context() as patch:
        pulled_at(patch, update)
        with pytest.raises(KeyboardInterrupt):
            train(place, "features", tmp_path / "r", *STAGES, "train.z=mixed")
    found = dbconvert.train(str(place / "features"), resume=True, out=str(tmp_path / "r"))
    assert found.metrics == staged.metrics
    assert all(same(a, b) for a, b in zip(weights(found).values(), weights(staged).values(), strict=True))


# -- a job a block ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("features", "mixed"), ("raw", "on-policy"), ("dit", "mixed")], ids=str)
def jobs(request, place, tmp_path_factory):
    """(package, z, runs of its three blocks, one after the other)."""
    (name, z), folder = request.param, tmp_path_factory.mktemp("jobs")
    shutil.copytree(place / name, folder / name)
    runs = []
    for block in range(3):
        after = [f"train.after=[{','.join(str(run.folder) for run in runs)}]"]
        runs.append(train(folder, name, folder / f"b{block}", *ALONE, f"train.z={z}", *after, block=block))
    return folder, name, z, runs


def test_jobs_one_after_the_other_are_the_stages_of_one_run(jobs, tmp_path):
    """To the bit, and they come together."""
    folder, name, z, runs = jobs
    together = train(folder, name, tmp_path / "r", *ALONE, "train.order=stagewise", f"train.z={z}")
    whole = weights(together)
    for block, run in enumerate(runs):
        mine = weights(run)
        assert set(mine) == {f"block-{block}.safetensors", "periphery.safetensors"}
        assert all(same(mine[key], whole[key]) for key in mine)
    found = json.loads((runs[2].folder / "run.json").read_text())
    assert set(found["before"]) == {"block-0.safetensors", "block-1.safetensors"} and found["blocks"] == [2]
    path = dbconvert.assemble([str(run.folder) for run in runs], out=str(tmp_path / "m.safetensors"))
    overrides = ["eval.draws=1", "eval.sigmas=2"]
    figures = dbconvert.evaluate(str(path), part="validation", overrides=overrides).metrics
    assert figures == pytest.approx(together.metrics, rel=1e-4)


def test_a_job_resumes_to_the_bit_and_only_on_what_it_began_with(jobs, tmp_path, monkeypatch):
    folder, name, z, runs = jobs
    shutil.copytree(runs[0].folder, tmp_path / "b0")
    shutil.copytree(folder / name, tmp_path / name)
    with monkeypatch.context() as patch:
        pulled_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            after = f"train.after=[{tmp_path / 'b0'}]"
            train(tmp_path, name, tmp_path / "r", *ALONE, f"train.z={z}", after, block=1)
    shutil.copytree(tmp_path / "r", tmp_path / "moved")
    found = dbconvert.train(str(tmp_path / name), resume=True, block=1, out=str(tmp_path / "r"))
    assert all(same(a, b) for a, b in zip(weights(found).values(), weights(runs[1]).values(), strict=True))
    shutil.rmtree(tmp_path / "b0")
    train(tmp_path, name, tmp_path / "b0", *ALONE, f"train.z={z}", "train.steps=1", block=0)
    with pytest.raises(DBConvertError, match=r"block-0.safetensors is not what .*moved began with: its weights have"):
        dbconvert.train(str(tmp_path / name), resume=True, block=1, out=str(tmp_path / "moved"))


def test_what_does_not_belong_together_is_refused(jobs, tmp_path):
    folder, name, z, runs = jobs
    shutil.copytree(folder / name, tmp_path / name)
    other = train(tmp_path, name, tmp_path / "b0", *ALONE, f"train.z={z}", "train.steps=1", block=0)
    mixed = [str(run.folder) for run in (other, runs[1], runs[2])]
    with pytest.raises(DBConvertError, match="was trained after another block-0 than the one given"):
        dbconvert.assemble(mixed, out=str(tmp_path / "m.safetensors"))
    with pytest.raises(DBConvertError, match="was trained after another block-0 than the one given"):
        after = f"train.after=[{mixed[0]},{mixed[1]}]"
        train(tmp_path, name, tmp_path / "r", *ALONE, f"train.z={z}", after, block=2)


def test_a_block_that_hears_others_is_not_judged_without_them(jobs):
    _, name, _, runs = jobs
    if name == "raw":
        assert "loss_block_1" in dbconvert.evaluate(str(runs[1].folder), overrides=["eval.sigmas=0"]).metrics
        return
    with pytest.raises(DBConvertError, match="block 1 hears what block 0 delivers, which is not there"):
        dbconvert.evaluate(str(runs[1].folder), overrides=["eval.sigmas=0"])


def test_the_newest_finished_runs_are_found(place, tmp_path, monkeypatch):
    shutil.copytree(place / "raw", tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    for block in (0, 1):
        made = dbconvert.train("raw", overrides=[*ALONE, "train.z=on-policy"], block=block)
    assert made.folder.name == "raw-block1-001" and "raw-block0-001" in (made.folder / "recipe.yaml").read_text()


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "z", "why"),
    [
        ("features", "noised", r"it hears what block 1 delivers \(context `features`\)"),
        ("raw", "on-policy", r"the sampler comes to it through the blocks before it \(train.z=on-policy\)"),
    ],
)
def test_predecessors_that_are_missing(place, tmp_path, monkeypatch, name, z, why):
    monkeypatch.chdir(tmp_path)
    told = rf"block 2 cannot be trained alone yet: no finished run of block 0 .* is under runs/\n.*{why}\n.*--block 0"
    with pytest.raises(UsageError, match=told):
        train(place, name, tmp_path / "r", *ALONE, f"train.z={z}", block=2)
    assert not (tmp_path / "r").exists()


def test_predecessors_that_nobody_needs(place, staged, tmp_path):
    with pytest.raises(UsageError, match=r"train.after names finished runs of earlier blocks, and nothing here needs"):
        train(place, "raw", tmp_path / "r", *ALONE, f"train.after=[{staged.folder}]", block=1)


def test_runs_with_a_shared_periphery_are_no_predecessors(place, staged, tmp_path):
    with pytest.raises(
        UsageError, match=r"no finished run of block 0 of this package is among the runs of train.after"
    ):
        train(place, "features", tmp_path / "r", *ALONE, f"train.after=[{staged.folder}]", block=1)


def test_noise_is_not_refitted_between_stages(place, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"source: {place / 'vit.py'}\nsplit: {{blocks: 3}}\nnoise: {{refit: [0.5]}}\n")
    with pytest.raises(UsageError, match=r"train.order=stagewise has finished the first ones by then"):
        dbconvert.train(str(recipe), overrides=STAGES, out=str(tmp_path / "r"))


def test_a_dry_run_counts_one_block_at_a_time(place):
    found = outline(str(place / "features"), overrides=STAGES).memory
    assert [unit.name for unit in found.units] == ["block-0", "block-1", "block-2"]
    assert found.units[0].state > found.units[2].state
