"""Drawing images: split, train, assemble, load, evaluate and sample; seeds, classes, guidance, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from engine.conftest import QUICK
from PIL import Image
from small_dit import SMALL, write_model

import dbconvert
from dbconvert.data.images import denormalise
from dbconvert.data_options import DataOptions, ImageOptions
from dbconvert.engine.mover import block_parameters
from dbconvert.engine.outline import outline
from dbconvert.engine.sample import Sampling, draw, drawing_task, labels_of, sample
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Advance
from dbconvert.recipe import SplitOptions

pytestmark = pytest.mark.usefixtures("quick_splits")
DATA = DataOptions(source="digits", image=ImageOptions(mean=(0.5,), std=(0.5,)))
FAST = Sampling(steps=6, batch=5, guidance=2.0)
UNLABELLED = """
class Alone(DiT):
    def forward(self, images, time):
        return super().forward(images, time, time.new_zeros(len(time), dtype=torch.long))


def example_inputs():
    return {"images": torch.randn(2, 1, 8, 8), "time": torch.rand(2)}


def build_model():
    return Alone(size=8, patch=4, channels=1, classes=1, depth=3, width=16, heads=2)
"""


def split(folder, *build):
    source = write_model(folder, *build)
    dbconvert.split(str(source), out=str(folder / "package"), options=SplitOptions(blocks=3), data=DATA)
    return folder / "package"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return split(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def run(package):
    overrides = [*QUICK, "train.label_dropout=0.1", "optimizer.lr=0.01"]
    return dbconvert.train(str(package), overrides=overrides, out=str(package.parent / "run"))


@pytest.fixture(scope="module")
def checkpoint(run):
    return dbconvert.assemble([str(run.folder)], out=str(run.folder.parent / "model.safetensors"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return dbconvert.load(checkpoint)


def drawn(loaded, count=12, sampling=FAST, **options):
    labels = labels_of(loaded.network.task, None, count, loaded.label_dropout, sampling.guidance)
    return draw(loaded.network, loaded.intervals, count, labels, sampling, **options)


# -- training and evaluation --------------------------------------------------------------------------------------


def test_evaluation_weighs_the_losses_of_every_block(run, checkpoint):
    """A network that gives zeros has the weighted loss E|y - c_skip z|^2 / c_out^2, about 1 at the right sigma_data."""
    found = dbconvert.evaluate(str(checkpoint)).metrics
    blocks = [found[f"loss_block_{b}"] for b in range(3)]
    assert found["loss"] == pytest.approx(np.mean(blocks), rel=1e-5) and "loss_block_2" in run.metrics
    assert len([name for name in found if name.startswith("loss_sigma")]) == 8
    assert all(0.1 < value < 10 for value in found.values())


@pytest.mark.parametrize("method", ["end-to-end", "shallow"])
def test_baselines_denoise_at_all_levels(package, method, tmp_path):
    result = dbconvert.train(str(package), overrides=[*QUICK, f"train.method={method}"], out=str(tmp_path / "r"))
    loaded = dbconvert.load(tmp_path / "r")
    assert {"loss", "loss_block_0", "loss_block_2"} <= set(result.metrics)
    calls = counted(loaded.network)
    images = drawn(loaded, sampling=replace(FAST, guidance=1.0), layers=loaded.layers)
    layers = 3 if method == "end-to-end" else 1
    assert images.shape == (12, 1, 8, 8) and sum(calls.values()) == layers * 6 * 3  # evaluations, batches


def test_the_weight_is_edms_by_default(package, tmp_path):
    """Steps with w(sigma) differ from those without; the loss that is logged does not."""
    lines = {}
    for weight in ("null", "edm", "none"):
        overrides = [*QUICK, "train.steps=1", f"train.weight={weight}", "train.clip=1e9"]
        folder = dbconvert.train(str(package), overrides=overrides, out=str(tmp_path / weight)).folder
        lines[weight] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert lines["null"]["loss"] == lines["edm"]["loss"] == lines["none"]["loss"]
    assert lines["null"]["grad_norm"] == lines["edm"]["grad_norm"] != lines["none"]["grad_norm"]


def test_a_killed_run_goes_on_to_the_bit(package, tmp_path):
    overrides = [*QUICK, "train.label_dropout=0.5", "train.checkpoint_every=3"]
    whole = dbconvert.train(str(package), overrides=overrides, out=str(tmp_path / "whole"))
    seen = []

    def stop(event):
        seen.extend([event] if isinstance(event, Advance) else [])
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dbconvert.train(str(package), overrides=overrides, out=str(tmp_path / "cut"), report=stop)
    resumed = dbconvert.train(str(package), resume=True, out=str(tmp_path / "cut"))
    for file in (whole.folder / "weights").iterdir():
        assert file.read_bytes() == (resumed.folder / "weights" / file.name).read_bytes()


@pytest.mark.parametrize("extra", [["train.precision=bf16"], ["train.accumulate=2"], ["train.checkpointing=true"]])
def test_options_train(package, extra, tmp_path):
    overrides = [*QUICK, "train.steps=1", "train.label_dropout=0.3"]
    losses = []
    for name, more in (("plain", []), ("other", extra)):
        folder = dbconvert.train(str(package), overrides=[*overrides, *more], out=str(tmp_path / name)).folder
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()[:3]])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # accumulation draws other noise for its parts


def test_blocks_train_alone_with_stems_of_their_own(package, tmp_path):
    alone = [*QUICK, "train.steps=2", "train.periphery=frozen-target"]
    runs = [
        dbconvert.train(str(package), overrides=alone, block=b, out=str(tmp_path / f"b{b}")).folder for b in range(3)
    ]
    loaded = dbconvert.load(dbconvert.assemble(map(str, runs), out=str(tmp_path / "m.safetensors")))
    assert drawn(loaded, sampling=replace(FAST, guidance=1.0)).isfinite().all()
    with pytest.raises(UsageError, match="has only block 1"):
        sample(str(runs[1]), out=str(tmp_path / "s"))


def test_dry_run_and_estimate(package):
    planned = outline(str(package), overrides=QUICK)
    assert {unit.name for unit in planned.memory.units} == {"block-0", "block-1", "block-2"}
    whole = planned.controls["end-to-end"].largest.activations
    assert whole > 1.5 * planned.memory.largest.activations
    rows = dbconvert.estimate(str(package.parent / "model.py")).rows
    assert [row.blocks for row in rows] == [None, 1, 2, 3]


# -- drawing ------------------------------------------------------------------------------------------------------


def counted(network):
    """How often each layer runs."""
    calls = dict.fromkeys(range(3), 0)

    def count(index):
        return lambda *_: calls.update({index: calls[index] + 1})

    for index in calls:
        network.model.layers[index].attention.register_forward_pre_hook(count(index))
    return calls


def test_images_do_not_depend_on_the_batch(loaded):
    one, other = drawn(loaded), drawn(loaded, sampling=replace(FAST, batch=12))
    assert torch.allclose(one, other, atol=1e-5)
    assert torch.equal(drawn(loaded, count=7), one[:7])
    assert not torch.allclose(one, drawn(loaded, sampling=replace(FAST, seed=1)), atol=1e-2)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp-2m"])
def test_every_evaluation_runs_one_block(checkpoint, sampler):
    loaded = dbconvert.load(checkpoint)
    calls = counted(loaded.network)
    images = drawn(loaded, sampling=Sampling(steps=9, sampler=sampler, grid="quantiles", batch=12))
    assert sum(calls.values()) == 9 and min(calls.values()) > 0 and images.shape == (12, 1, 8, 8)


@pytest.mark.parametrize("grid", ["karras", "quantiles"])
def test_sampling_is_euler_by_hand(loaded, grid):
    """The grid's levels, EDM's eq. 5 by default, the block of each level, on from the last to its D."""
    images = drawn(loaded, count=3, sampling=Sampling(steps=4, batch=3, **({} if grid == "karras" else {"grid": grid})))
    noise, network = loaded.intervals, loaded.network
    thirds = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    roots = 0.002 ** (1 / 7) + thirds * (80 ** (1 / 7) - 0.002 ** (1 / 7))
    inner = roots**7 if grid == "karras" else noise.distribution.icdf(thirds)
    levels = [80.0, *inner.tolist(), 0.002]
    from dbconvert.engine.sample import noise as starts

    z = next(starts(3, (1, 8, 8), Sampling())) * 80.0
    inputs = {"images": z, "label": torch.arange(3)}
    for level, following in zip(levels, [*levels[1:], 0.0], strict=True):
        with torch.no_grad():
            estimate = network.denoise(noise.block_of(level), inputs, z, torch.full((3,), level))
        z = z + (following - level) * (z - estimate) / level
    assert torch.allclose(images, z, atol=1e-5)


def test_guidance_moves_away_from_no_class(loaded):
    """After one evaluation, D itself: none + w (class - none)."""
    one = {w: drawn(loaded, count=4, sampling=Sampling(steps=1, guidance=w)) for w in (0.0, 1.0, 3.0)}
    assert torch.allclose(one[3.0], one[0.0] + 3 * (one[1.0] - one[0.0]), atol=1e-5)
    assert not torch.allclose(one[0.0], one[1.0])


def test_only_one_block_is_moved(checkpoint):
    """To the device goes the block that runs, with nothing of another."""
    network = dbconvert.load(checkpoint).network
    parts = block_parameters(network)
    assert [len(part) for part in parts.values()] == [10, 10, 10]
    assert all(name.startswith("layers.1.") for name in parts[1])


def test_files(checkpoint, tmp_path):
    out = commands.dbconvert(
        "sample", checkpoint, "-o", "s", "--count", 6, "--classes", "7,1", "--steps", 4, "--guidance", 2
    ).stdout
    assert "wrote 6 images to s/" in out
    sheet = json.loads(Path("s/samples.json").read_text())
    assert [image["label"] for image in sheet["images"]] == [7, 1, 7, 1, 7, 1] and sheet["sampling"]["steps"] == 4
    singles = [np.array(Image.open(Path("s") / image["file"])) for image in sheet["images"]]
    grid = np.array(Image.open("s/grid.png"))
    assert singles[0].shape == (8, 8) and grid.shape == (3 * 10 + 2, 2 * 10 + 2)
    assert (grid[2:10, 12:20] == singles[1]).all() and (grid[22:30, 2:10] == singles[4]).all()
    with pytest.raises(UsageError, match="s exists already"):
        sample(str(checkpoint), out="s")
    loaded = dbconvert.load(checkpoint)
    labels = torch.tensor([7, 1] * 3)
    images = draw(loaded.network, loaded.intervals, 6, labels, Sampling(steps=4, guidance=2.0))
    written = torch.tensor(np.stack(singles)) / 255
    assert torch.allclose(denormalise(images, loaded.data.image)[:, 0], written, atol=0.01)


def test_a_network_without_classes(tmp_path):
    package = split(tmp_path / "alone", UNLABELLED)
    run = dbconvert.train(str(package), overrides=QUICK, out=str(tmp_path / "r"))
    sample(str(run.folder), out="s", count=3, sampling=Sampling(steps=3))
    assert len(list(Path("s").glob("0*.png"))) == 3
    for options in ({"classes": (1,)}, {"sampling": FAST}):
        with pytest.raises(UsageError, match="takes no class"):
            sample(str(run.folder), out="t", **options)
    with pytest.raises(UsageError, match="told none"):
        dbconvert.train(str(package), overrides=[*QUICK, "train.label_dropout=0.1"], out=str(tmp_path / "d"))


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": (10,)}, "there is no class 10"),  # the row that stands for none
        ({"classes": (3, -1)}, "there is no class -1"),
        ({"classes": ()}, "no class was named"),
        ({"count": 0}, "0 images"),
    ],
)
def test_requests_that_cannot_be(checkpoint, options, message):
    with pytest.raises(UsageError, match=message):
        sample(str(checkpoint), out="s", **options)
    assert not Path("s").exists()


def test_guidance_without_dropout(package, tmp_path):
    run = dbconvert.train(str(package), overrides=[*QUICK, "train.steps=1"], out=str(tmp_path / "r"))
    with pytest.raises(UsageError, match="trained without classes too"):
        sample(str(run.folder), out="s", sampling=FAST)


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        (10, ["train.label_dropout=0.1"], "uses all 10 rows"),
        (9, [], "has label 9, and the network has 9 classes"),
    ],
)
def test_a_table_of_too_few_rows(tmp_path, rows, overrides, message):
    package = split(tmp_path / "few", SMALL.replace("classes=10", f"classes={rows - 1}"))
    with pytest.raises(DBConvertError, match=message):
        dbconvert.train(str(package), overrides=[*QUICK, *overrides])


def test_images_that_do_not_fit(package, tmp_path):
    with pytest.raises(UsageError, match=r"16 x 16 pixels, and the network takes 1 channels of 8 x 8"):
        dbconvert.train(str(package), overrides=[*QUICK, "data.image.size=16"])


def test_networks_that_draw_nothing(checkpoint, loaded):
    other = dbconvert.load(checkpoint)
    other.network.decided_task = None
    with pytest.raises(UsageError, match="x draws no images"):
        drawing_task(other, "x")
    with pytest.raises(UsageError, match="predicts nothing"):
        loaded(torch.zeros(1, 1, 8, 8))


def test_numbers_that_are_none(checkpoint):
    loaded = dbconvert.load(checkpoint)
    loaded.network.model.layers[2].mlp[0].weight.data.fill_(float("nan"))
    with pytest.raises(DBConvertError, match="not finite"):
        drawn(loaded)
