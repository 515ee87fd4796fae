"""train.inactive: blocks that do not train are away from the device, with the same bits; refusals, and full disks."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine.conftest import QUICK, pulled_and_resumed
from small_text import corpus_in, write_gpt
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.engine.convert import fill_blocks, hollow_network, whole_network
from dbconvert.engine.loop import Loop
from dbconvert.engine.mover import Mover, block_parameters, changed
from dbconvert.engine.outline import outline
from dbconvert.engine.package import open_package
from dbconvert.engine.stores import DiskStore, HostStore
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.recipe import NoiseRule, SplitOptions

HOST, DISK, AHEAD = "train.inactive=host", "train.inactive=disk", "train.prefetch=true"
TURNS = ["train.order=rotate", "train.steps_per_turn=2"]


def weights(run):
    """Of all blocks and the periphery; the noise that it ended with."""
    files = sorted((run.folder / "weights").iterdir())
    return {k: v for p in files for k, v in load_tensors(p).items()}, (run.folder / "noise.json").read_text()


def same(one, other):
    (a, noise), (b, other_noise) = weights(one), weights(other)
    return noise == other_noise and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("store", [[HOST], [DISK], [DISK, AHEAD]], ids=" ".join)
def test_training_is_the_same_to_the_bit(run_of_all, package, store):
    moved = dbconvert.train(str(package), overrides=[*QUICK, *store], out="moved")
    assert same(moved, run_of_all) and moved.metrics == run_of_all.metrics
    assert not (moved.folder / "away").exists()


@pytest.mark.parametrize(
    ("periphery", "store"), [("shared", [DISK]), ("frozen-target", [HOST, AHEAD]), ("frozen-target", [DISK])]
)
def test_a_pulled_run_resumes_to_the_bit(package, periphery, store):
    recipe = [*QUICK, *TURNS, "train.steps=6", "train.checkpoint_every=5", f"train.periphery={periphery}"]
    recipe += ["data.validation=null"]
    straight = dbconvert.train(str(package), overrides=recipe, out="straight")
    resumed = pulled_and_resumed(package, [*recipe, *store], 13, "pulled")
    assert same(straight, resumed) and not Path("pulled/away").exists()


def test_independent_blocks_of_another_method_move_too(package):
    recipe = [*QUICK, "train.steps=2", "train.method=noprop-dt"]
    plain = dbconvert.train(str(package), overrides=recipe, out="plain")
    moved = dbconvert.train(str(package), overrides=[*recipe, DISK], out="moved")
    assert moved.metrics == plain.metrics
    a, b = (load_tensors(run.folder / "weights" / "network.safetensors") for run in (plain, moved))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "options",
    [["optimizer.name=adamw8bit", "optimizer.in_backward=true", "train.clip=null"], ["train.precision=bf16-true"]],
    ids=" ".join,
)
def test_other_optimisers_state_moves_too(package, options):
    pytest.importorskip("torchao")
    recipe = [*QUICK, *options, "train.steps=3", "data.validation=null", "train.checkpoint_every=5"]
    with torch.compiler.set_stance("force_eager"):  # kernels for every shape would take minutes
        straight = dbconvert.train(str(package), overrides=recipe, out="straight")
        resumed = pulled_and_resumed(package, [*recipe, DISK], 7, "pulled")
    assert same(straight, resumed)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A GPT in three blocks that hear each other, with noise that is fitted again."""
    folder = tmp_path_factory.mktemp("text")
    write_gpt(folder, depth=3)
    noise = NoiseRule(rule="auto", refit=(0.5,))
    options = SplitOptions(blocks=3, context="features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbconvert.engine.split.draw_noise", lambda *_: None)
        dbconvert.split(str(folder / "gpt.py"), out=str(folder / "heard"), options=options, noise=noise)
    return folder


def test_blocks_that_are_heard_are_brought_and_noise_is_fitted_again(text):
    recipe = [*corpus_in(text), "train.z=mixed"]
    plain = dbconvert.train(str(text / "heard"), overrides=recipe, out="plain")
    moved = dbconvert.train(str(text / "heard"), overrides=[*recipe, DISK], out="moved")
    assert same(plain, moved) and plain.metrics == moved.metrics


# -- what is where ----------------------------------------------------------------------------------------------------


def storages(tensors):
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_only_the_active_block_is_on_the_device(package, monkeypatch):
    """In every update: parameters and moments of other blocks are those of the store, and take no memory beside it."""
    seen, whole = [], Loop.update

    def watched(self, block, batch):
        loss = whole(self, block, batch)
        mover, network = self.job.mover, self.job.network
        stored = {t.data_ptr() for part in (mover.homes, mover.kept) for b in part for t in part[b].values()}
        there = [p for p in network.parameters() if p.data_ptr() not in stored]
        owners = {network.owner(name) for name, p in network.model.named_parameters() if p.data_ptr() not in stored}
        moments = [
            value
            for unit in self.job.all_units()
            for state in unit.optimizer.state.values()
            for value in state.values()
            if value.dim() and value.data_ptr() not in stored
        ]
        seen.append((block, owners, storages([p.data for p in there]), storages(moments)))
        return loss

    monkeypatch.setattr(Loop, "update", watched)
    run = dbconvert.train(str(package), overrides=[*QUICK, *TURNS, HOST, "data.validation=null"], out="moved")
    for block, owners, held, moments in seen:
        assert owners == {None, block}
        assert held == 4 * run.memory.units[block].trainable and moments == 2 * held
    assert run.memory.resident_state == max(unit.state for unit in run.memory.units)
    assert run.memory.resident_parameters == max(unit.trainable for unit in run.memory.units)


def test_what_the_run_holds_is_counted_before_it_runs(package):
    kept = {more: outline(str(package), overrides=[*QUICK, *more]).memory for more in ((), (HOST,), (HOST, AHEAD))}
    resident, moved, ahead = kept.values()
    largest = max(moved.units, key=lambda unit: unit.state)
    assert moved.units == resident.units and moved.resident_state == largest.state < resident.resident_state
    assert largest.state < ahead.resident_state <= resident.resident_state


def test_no_weight_is_in_memory_before_its_part_is_read(package, tmp_path):
    opened = open_package(package)
    network = hollow_network(opened.plan, opened.source())
    added = "dbconvert.readout."  # small, and real from the beginning
    read = []

    def part(block):
        read.append(block)
        filled = {
            network.owner(name) for name, p in network.model.named_parameters() if not p.is_meta and added not in name
        }
        assert filled <= {None, *range(block)}
        return opened.tensors(block=block)

    store = DiskStore(tmp_path / "store")
    homes = fill_blocks(network, part, store, own=False, dtype=torch.float32)
    assert read == [0, 0, 1, 2]
    whole = whole_network(opened.plan, opened.source())
    whole.load(opened.tensors(), where="package")
    mover = Mover(network, homes, store)
    mover.begin({}, torch.device("cpu"))
    inputs = {"images": torch.randn(2, 1, 8, 8)}, torch.randn(2, 16), torch.full((2,), 0.5)
    with torch.no_grad():
        for block in (0, 2, 2, 1):
            assert torch.equal(network.eval().denoise(block, *inputs), whole.eval().denoise(block, *inputs))
            assert mover.guest == block
    assert mover.moves == 3
    stored = load_tensors(tmp_path / "store" / "block-1.safetensors")
    assert stored.keys() == homes[1].keys() and all(torch.equal(stored[k], whole.tensors()[k]) for k in stored)
    mover.end()
    assert network.bring is None and mover.guest is None


def test_state_of_several_tensors_moves_part_by_part():
    value = TwoTensor(torch.ones(4), torch.zeros(4))
    found = {}
    changed(value, lambda place, tensor: found.setdefault(place, tensor + 1), "p|exp_avg")
    assert {place: int(tensor[0]) for place, tensor in found.items()} == {"p|exp_avg|a": 2, "p|exp_avg|b": 1}
    again = changed(value, lambda place, _: found[place], "p|exp_avg")
    assert isinstance(again, TwoTensor) and again.a is found["p|exp_avg|a"] and again.shape == value.shape


# -- what is refused, and what fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "block", "told"),
    [
        (["train.method=end-to-end"], None, "train.method=end-to-end trains all that it holds"),
        (["train.periphery=frozen-target"], 1, "--block 1 trains one block alone"),
    ],
)
def test_nothing_is_taken_away_where_one_thing_trains(package, overrides, block, told):
    with pytest.raises(UsageError, match=r"train.inactive=host has nothing to take away") as caught:
        dbconvert.train(str(package), overrides=[*QUICK, HOST, *overrides], block=block, out="r")
    assert told in caught.value.why and not Path("r").exists()


def test_one_block_and_blocks_that_are_there_have_nothing_to_bring(package, model_file):
    with pytest.raises(UsageError, match=r"train.prefetch brings blocks that are away"):
        dbconvert.train(str(package), overrides=[*QUICK, AHEAD])
    recipe = f"source: {model_file}\ntask: classification\nsplit: {{blocks: 1}}\ndata: {{source: digits}}\n"
    Path("one.yaml").write_text(recipe)
    with pytest.raises(UsageError, match="nothing to take away") as caught:
        dbconvert.train("one.yaml", overrides=[*QUICK, DISK])
    assert caught.value.why == "the network is one block"


def test_several_processes_are_refused(package, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(UsageError, match=r"train.inactive=disk runs in one process only"):
        dbconvert.train(str(package), overrides=[*QUICK, DISK], out="r")


def test_parameters_of_two_blocks_are_refused():
    shared = nn.Linear(2, 2)
    model = nn.ModuleList([shared, shared])
    network = SimpleNamespace(model=model, present=(0, 1), owner=lambda key: int(key[0]))
    with pytest.raises(UsageError, match=r"0.weight and 1.weight are one parameter"):
        block_parameters(network)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(package, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DBConvertError, match=r"train.inactive=disk needs 0.00 GB in .*, and its disk has 0.00 GB left"):
        dbconvert.train(str(package), overrides=[*QUICK, DISK], out="r")
    assert not Path("r").exists()


def test_memory_that_is_too_small_is_refused(package, monkeypatch):
    monkeypatch.setattr("dbconvert.engine.stores.available_bytes", lambda: 1000)
    with pytest.raises(DBConvertError, match=r"train.inactive=host needs 0.00 GB of memory"):
        dbconvert.train(str(package), overrides=[*QUICK, HOST], out="r")
    assert not Path("r").exists()


@pytest.mark.parametrize("name", ["block-1", "block-1.optimizer"])
def test_a_disk_that_fills_up_gives_one_message_and_leaves_nothing(package, monkeypatch, name):
    """While the blocks are laid out, or when the first optimiser state comes to lie there; an older state is kept."""
    reserve = os.posix_fallocate

    def full(file, at, size):
        if Path(f"/proc/self/fd/{file}").readlink().name == f"{name}.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(file, at, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    recipe = [*QUICK, DISK, "train.order=rotate", "train.checkpoint_every=1"]
    with pytest.raises(DBConvertError, match=rf"no space left on the disk while writing r/away/{name}.safetensors"):
        dbconvert.train(str(package), overrides=recipe, out="r")
    assert not Path("r/away").exists()
    if name == "block-1":
        assert not Path("r").exists()
    else:
        assert json.loads(Path("r/run.json").read_text())["status"] == "running" and any(
            Path("r/checkpoints").iterdir()
        )


def test_running_out_of_memory_is_said_with_what_would_help(package, monkeypatch):
    said = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried for"

    def full(*_):
        raise RuntimeError(f"{said} 64 bytes. Error code 12")

    monkeypatch.setattr(Loop, "update", full)
    with pytest.raises(DBConvertError, match="out of memory") as caught:
        dbconvert.train(str(package), overrides=[*QUICK, DISK], out="r")
    assert caught.value.why == "DefaultCPUAllocator: can't allocate memory: you tried for 64 bytes"
    assert "train.inactive=host or disk" in caught.value.hint and not Path("r/away").exists()


def test_room_in_memory_is_given_anew_for_other_shapes():
    store = HostStore(pinned=False)
    first = store.room("a", {"x": torch.ones(3), "y": torch.ones(5, dtype=torch.bool), "n": torch.ones(0, 2)})
    assert [tuple(t.shape) for t in first.values()] == [(3,), (5,), (0, 2)] and first["y"].dtype is torch.bool
    assert not any(t.any() for t in first.values())
    assert first["x"].data_ptr() % 64 == first["y"].data_ptr() % 64
