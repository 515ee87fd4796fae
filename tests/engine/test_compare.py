"""compare: a grid and its baselines, each trained once; what is finished stays, what failed says why."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_dit
from engine.conftest import EXAMPLES

from dbconvert.cli.main import guarded
from dbconvert.engine import compare as comparing
from dbconvert.engine.cell import run_cell, work_figures
from dbconvert.engine.compare import compare, plan_comparison
from dbconvert.engine.grid import Request, lay_out, parse_vary
from dbconvert.engine.loop import Loop
from dbconvert.errors import UsageError
from dbconvert.plan import read_plan
from dbconvert.recipe import read_recipe

QUICK = "eval: {draws: 1, sigmas: 0}\nlog: {every: 1}\n"
DIGITS = "data: {source: digits, image: {mean: [0.5], std: [0.375]}}\n"
VERSIONS = {"dbconvert": "1"}


def write(folder, model, data=DIGITS, train="{steps: 2, batch: 16}"):
    path = folder / "tiny.yaml"
    head = f"source: {model}\ntask: classification\nsplit: {{blocks: 2}}\n"
    path.write_text(head + data + f"train: {train}\n" + QUICK)
    return str(path)


@pytest.fixture(scope="module")
def recipe(model_file, tmp_path_factory):
    return write(tmp_path_factory.mktemp("recipe"), model_file)


@pytest.fixture
def here(monkeypatch):
    """Cells run in this process; says which did."""
    ran = []

    def spawn(place):
        ran.append(place.name.rsplit("-", 1)[0])
        run_cell(place)
        return 0

    monkeypatch.setattr(comparing, "spawn", spawn)
    return ran


def names(target, *vary, seeds=1, overrides=(), against=()):
    request = Request(target, tuple(overrides), parse_vary(vary), seeds, tuple(against))
    return [(one.cell.name, one.cell.seed) for one in lay_out(request, VERSIONS)]


# -- what is run ------------------------------------------------------------------------------------------------


def test_baselines_are_trained_once_for_all_that_does_not_matter_to_them(recipe):
    assert names(recipe, "noise.partition=equal-mass,uniform", "split.blocks=1,3") == [
        ("split.blocks=1", 0),  # which has nothing to partition
        ("noise.partition=equal-mass, split.blocks=3", 0),
        ("noise.partition=uniform, split.blocks=3", 0),
        ("end-to-end", 0),
        ("shallow control, split.blocks=3", 0),  # of one block it is end-to-end training
    ]
    assert names(recipe, "split.blocks=2,3", against=["checkpointing"])[4:] == [
        ("shallow control, split.blocks=3", 0),
        ("end-to-end with activation checkpointing", 0),
    ]
    assert names(recipe, "split.entry=token,add", "noise.rule=auto,edm", against=["forward-forward"])[4:] == [
        ("end-to-end", 0),
        ("shallow control", 0),
        ("Forward-Forward, split.entry=token", 0),
        ("Forward-Forward, split.entry=add", 0),
    ]
    assert names(recipe, "split.blocks=2,3", "noise.rule=auto,edm", against=["noprop-dt"])[7:] == [
        ("NoProp-DT, split.blocks=2", 0),
        ("NoProp-DT, split.blocks=3", 0),
    ]
    assert names(recipe, "optimizer.lr=0.1,0.2", "noise.rule=auto,edm")[4:] == [
        ("end-to-end, optimizer.lr=0.1", 0),
        ("end-to-end, optimizer.lr=0.2", 0),
        ("shallow control, optimizer.lr=0.1", 0),
        ("shallow control, optimizer.lr=0.2", 0),
    ]


def test_baselines_have_no_blocks_that_are_away(recipe):
    asked = Request(recipe, ("train.inactive=disk", "train.prefetch=true"), parse_vary(["train.inactive=disk,host"]), 1)
    planned = [
        (one.cell.name, one.recipe.train.inactive, one.recipe.train.prefetch) for one in lay_out(asked, VERSIONS)
    ]
    assert planned == [
        ("train.inactive=disk", "disk", True),
        ("train.inactive=host", "host", True),
        ("end-to-end", "resident", False),
        ("shallow control", "resident", False),
    ]


def test_noise_matters_to_baselines_that_are_shown_it():
    masked = str(EXAMPLES.parent / "recipes" / "mdm_text_tiny.yaml")
    assert [name for name, _ in names(masked, "noise.schedule=linear,cosine", "noise.partition=uniform")[2:]] == [
        "end-to-end, noise.schedule=linear",
        "end-to-end, noise.schedule=cosine",
        "shallow control, noise.schedule=linear",
        "shallow control, noise.schedule=cosine",
    ]
    images = str(EXAMPLES.parent / "recipes" / "dit_digits.yaml")
    assert [name for name, _ in names(images, "train.weight=none,edm", "noise.partition=uniform")[2:4]] == [
        "end-to-end, train.weight=none",
        "end-to-end, train.weight=edm",
    ]


def test_one_core_that_runs_again_and_again_has_a_shallow_control():
    huginn = str(EXAMPLES.parent / "recipes" / "huginn_text_tiny.yaml")
    assert [name for name, _ in names(huginn)] == ["blocks", "end-to-end", "shallow control"]


def test_no_training_twice_and_every_seed(recipe):
    assert names(recipe, "train.method=blocks,end-to-end", seeds=2, overrides=["seed=5"]) == [
        (name, seed)
        for seed in (5, 6)
        for name in ("train.method=blocks", "train.method=end-to-end", "shallow control")
    ]


def test_a_cell_is_known_by_what_it_trains_on_what_and_with_what(model_file, tmp_path):
    model = tmp_path / "model.py"
    model.write_text(model_file.read_text())
    target = write(tmp_path, model)

    def identity(overrides=(), versions=VERSIONS, part=None):
        return lay_out(Request(target, tuple(overrides), {}, 1, part=part), versions)[0].cell.identity

    first = identity()
    assert first == identity(["log.every=7"])
    others = [identity(["train.steps=9"]), identity(versions={"dbconvert": "2"}), identity(part="validation")]
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, moved)
    assert first == lay_out(Request(write(moved, moved / "model.py"), (), {}, 1), VERSIONS)[0].cell.identity
    model.write_text("import beside\n" + model.read_text())
    (tmp_path / "beside.py").write_text("WIDTH = 16")
    others.append(identity())
    (tmp_path / "beside.py").write_text("WIDTH = 32")
    assert len({first, identity(), *others}) == 6


def test_values_of_a_key_are_yaml():
    found = parse_vary(["split.layers=[2,3],[3,2]", "train.z=noised,on-policy", "noise.overlap=0.1,null,0.1"])
    assert found == {
        "split.layers": ("[2, 3]", "[3, 2]"),
        "train.z": ("noised", "on-policy"),
        "noise.overlap": ("0.1", "null"),
    }


def test_a_baseline_that_is_the_same_for_every_cut_takes_one_that_was_asked_for(recipe):
    """The recipe's own may not fit its network."""
    for values, own, expected in (("1,2", 3, 2), ("2,3", 3, 2), ("1,9", 2, 2), ("3,4", 2, 2)):
        varied = parse_vary([f"split.blocks={values}"])
        planned = lay_out(Request(recipe, (f"split.blocks={own}",), varied, 1), VERSIONS)
        (whole,) = [one for one in planned if one.cell.name == "end-to-end"]
        assert whole.recipe.split.blocks == expected and whole.cell.varied == {}


@pytest.mark.parametrize("word", ["forward-forward", "noprop-dt"])
def test_what_is_told_one_label_an_example_is_refused_at_once(word):
    with pytest.raises(UsageError, match=f"method={word} is for one label an example, and the task is causal_lm"):
        names("ar_text_tiny", against=[word])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"varied": ["split.blocks"]}, "does not say what to vary"),
        ({"varied": ["split.blocks="]}, "does not say what to vary"),
        ({"varied": ["seed=1,2"]}, "--seeds"),
        ({"varied": ["train.steps=1", "train.steps=2"]}, "varied twice"),
        ({"varied": ["train.steps=[1"]}, "not YAML"),
        ({"varied": ["train.stpes=1,2"]}, "did you mean steps"),
        ({"seeds": 0}, "at least one"),
        ({"against": ("giants",)}, "no baseline giants"),
        ({"overrides": ("data.test=null", "data.validation=null")}, "which part"),
    ],
)
def test_what_cannot_be_compared(recipe, asked, message):
    with pytest.raises(UsageError) as error:
        varied = parse_vary(asked.pop("varied", []))
        lay_out(Request(**{"target": recipe, "overrides": (), "varied": varied, "seeds": 1, **asked}), VERSIONS)
    assert message in str(error.value)


def test_forms_by_what_blocks_hear_of_each_other(recipe, package):
    """The paper's form is the recipe itself, and is trained once; forward passes are counted in a column."""
    planned = lay_out(Request(recipe, (), {}, 1, ("depth",)), VERSIONS)
    passes = {}
    for one in planned:
        plan = replace(
            read_plan(package / "plan.json"), blocks=((0, 2), (3, 4)), context=one.recipe.split.context or "raw"
        )
        plan = replace(plan, preview=replace(plan.preview, boundaries=plan.preview.boundaries[1:]))
        info = SimpleNamespace(method=one.recipe.train.method, updates=4)
        figures = work_figures(plan, one.recipe, info)
        passes[one.cell.name] = figures["passes"] - figures["layers"]
    forms = ["blocks", "end-to-end", "shallow control", "features, noised", "estimate, noised", "raw, on-policy"]
    both = ["features, on-policy", "estimate, on-policy", "features, mixed"]
    assert list(passes) == [*forms, "raw, mixed", *both]
    assert passes["blocks"] == passes["end-to-end"] == passes["shallow control"] == 0
    first, last = 3, 2  # layers of the two blocks: the first ones run for half of all updates
    assert passes["features, noised"] == pytest.approx(first / 2 / 3)
    assert passes["raw, on-policy"] == pytest.approx((first + last / 2) / 2 / 3)
    assert passes["features, mixed"] == pytest.approx((first + last / 4) / 2 / 3)


def test_forms_that_the_task_does_not_have_are_left_out():
    recurrent = names("huginn_text_tiny", "split.blocks=1", against=["depth"])
    assert [name for name, _ in recurrent][-2:] == ["raw, on-policy, split.blocks=1", "raw, mixed, split.blocks=1"]
    assert not any("features" in name or "estimate" in name for name, _ in recurrent)


def test_one_of_the_forms_alone():
    alone = names("vit_digits", against=["features-mixed"])
    assert [name for name, _ in alone] == ["blocks", "end-to-end", "shallow control", "features, mixed"]


def test_somebody_elses_folder_is_left_alone(recipe, tmp_path):
    (tmp_path / "theirs.txt").touch()
    with pytest.raises(UsageError, match="no comparison wrote"):
        plan_comparison(Request(recipe, (), {}, 1), str(tmp_path))


# -- what comes of it -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_splits")
def test_a_comparison(recipe, tmp_path, here):
    out = tmp_path / "out"
    asked = {"overrides": ["train.clip=0.5"], "vary": ["split.blocks=2,9"], "seeds": 1, "out": str(out)}
    found = compare(recipe, **asked)
    assert [(row.cell.name, row.status) for row in found.rows] == [
        ("split.blocks=2", "done"),
        ("split.blocks=9", "failed"),
        ("end-to-end", "done"),
        ("shallow control, split.blocks=2", "done"),
        ("shallow control, split.blocks=9", "failed"),
    ]
    assert "9 blocks cannot be cut from 5 layers" in found.rows[1].reason
    blocks, _, whole, shallow, _ = found.rows
    assert (blocks.figures["layers"], blocks.figures["updates"], blocks.figures["evaluations"]) == (3, 4, 3)
    assert (whole.figures["layers"], whole.figures["updates"], whole.figures["evaluations"]) == (5, 2, 1)
    assert (shallow.figures["layers"], shallow.figures["updates"]) == (3, 4)
    assert blocks.figures["activations"] < whole.figures["activations"] and shallow.figures["step"] > 0
    assert blocks.quality["accuracy from z = 0"] == blocks.metrics["accuracy_zero"]
    assert whole.quality == {"accuracy from z = 0": whole.metrics["accuracy"], "accuracy over draws": None}
    assert blocks.examples == 300 and {"dbconvert", "torch"} <= set(blocks.versions) and "CPU" in blocks.device

    table = (out / "table.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| split.blocks=2 |"))
    assert f"{100 * blocks.metrics['accuracy_zero']:.1f} %" in line
    assert f"- recipe {recipe} train.clip=0.5; seeds 0" in table
    assert "failed: 9 blocks cannot be cut" in table and "torch" in table and "test: 300 examples" in table
    assert line.count("|") == table.splitlines()[1].count("|")
    data = json.loads((out / "table.json").read_text())
    assert [row["status"] for row in data["rows"]] == [row.status for row in found.rows] and len(data["table"]) == 5
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG")

    here.clear()
    again = compare(recipe, **asked)
    assert here == ["split.blocks=9-seed0", "shallow-control-split.blocks=9-seed0"]
    assert again.rows[0] == found.rows[0] and again.failed == found.failed


@pytest.mark.usefixtures("here", "quick_splits")
def test_images_are_compared_by_their_distance_to_the_data(tmp_path):
    (tmp_path / "flat.py").write_text("from torch import nn\n\n\ndef build_model():\n    return nn.Flatten()\n")
    asked = ["eval.features=flat.py", "eval.samples=70", "eval.steps=2", "eval.sigmas=0"]
    few = [f"source={small_dit.write_model(tmp_path / 'dit')}", "train.steps=1", "train.batch=8", "split.blocks=2"]
    found = compare("dit_digits", overrides=[*asked, *few], part="validation", out=str(tmp_path / "out"))
    assert [row.status for row in found.rows] == ["done"] * 3
    assert all(row.quality["Frechet distance"] == row.metrics["frechet"] > 0 for row in found.rows)
    assert found.table()[0][1:3] == ["Frechet distance", "weighted loss"]


@pytest.mark.usefixtures("quick_splits")
def test_an_interruption_leaves_what_is_finished(recipe, tmp_path, here, monkeypatch):
    ordinary = comparing.spawn

    def interrupted(place):
        if here:
            raise KeyboardInterrupt
        return ordinary(place)

    monkeypatch.setattr(comparing, "spawn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, seeds=2, out=str(tmp_path / "out"))
    data = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["cell"]["name"] for row in data["rows"]] == ["blocks"] and data["left"] == 5


@pytest.mark.usefixtures("here", "quick_splits")
def test_the_command(recipe, tmp_path, capsys):
    asked = ["compare", recipe, "--vary", "split.blocks=9", "-o", str(tmp_path / "out")]
    assert guarded(asked, debug=False) == 1
    shown = capsys.readouterr()
    assert "failed: 9 blocks" in shown.out and "table.md" in shown.out and "2 of 3 cells failed" in shown.err
    assert guarded([*asked, "--seeds", "2", "--dry-run"], debug=False) == 0
    shown = capsys.readouterr().out
    assert "6 cells in" in shown and all(word in shown for word in ("finished", "failed", "new"))


KILLER = """
import os, signal
from pathlib import Path
import torch

class Digits:
    def __len__(self):
        return 32
    def __getitem__(self, index):
        states = list(Path({run!r}).glob("*/run/checkpoints/*"))
        if states and not Path({marker!r}).exists():
            Path({marker!r}).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {{"x": torch.full((1, 8, 8), index / 32), "label": index % 10}}

def parts(name):
    return Digits()
"""


def test_a_killed_cell_resumes_from_its_checkpoint(model_file, tmp_path, here, monkeypatch):
    out = tmp_path / "out"
    killer = tmp_path / "killer.py"
    killer.write_text(KILLER.format(run=str(out / "cells"), marker=str(tmp_path / "killed")))
    train = "{steps: 4, batch: 16, checkpoint_every: 2}"
    target = write(tmp_path, model_file, data="data: {source: killer.py:parts, input: x}\n", train=train)
    folder, planned = plan_comparison(Request(target, (), {}, 1), str(out))
    monkeypatch.undo()  # the first one runs in a process of its own
    row = comparing.run(folder, planned[0])
    assert row.status == "failed" and "killed by SIGKILL" in row.reason
    done, update = [], Loop.update
    monkeypatch.setattr(Loop, "update", lambda self, *given: done.append(self.updates) or update(self, *given))
    monkeypatch.setattr(comparing, "spawn", lambda place: run_cell(place) and 0)
    row = comparing.run(folder, planned[0])
    assert row.status == "done" and row.figures["updates"] == 8 and done == list(range(2, 8))
    trained = read_recipe(Path(comparing.cell_folder(folder, planned[0].cell)) / "run" / "recipe.yaml")
    assert trained.train == replace(planned[0].recipe.train, z="noised")
