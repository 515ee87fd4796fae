"""Losses that are read late: nothing in an update waits for the device, and the same run comes of it."""

import json
from functools import partial

import pytest
import torch
from engine.conftest import QUICK, pulled_and_resumed
from torch.utils._python_dispatch import TorchDispatchMode

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.engine import loop
from dbconvert.engine.loop import Loop
from dbconvert.engine.watch import Watch
from dbconvert.errors import DBConvertError

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")


class Reads(TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in READS
        return func(*args, **(kwargs or {}))


class LateWatch(Watch):
    def __init__(self, states, *, late, told):
        super().__init__(states, late=True, told=told)


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(loop, "Watch", LateWatch)


def weights(run):
    return {p.name: load_tensors(p) for p in (run.folder / "weights").iterdir()}


def same(one, other):
    a, b = weights(one), weights(other)
    return all(torch.equal(a[name][key], b[name][key]) for name in a for key in a[name])


def test_an_update_reads_nothing_but_what_is_logged(late, package, tmp_path, monkeypatch):
    whole, counts = Loop.update, {}

    def counted(self, block, batch):
        with Reads() as reads:
            found = whole(self, block, batch)
        counts[self.updates + 1] = reads.count, found
        return found

    monkeypatch.setattr(Loop, "update", counted)
    dbconvert.train(str(package), overrides=[*QUICK, "log.every=5"], out=str(tmp_path / "run"))
    assert len(counts) == 12
    for update, (reads, loss) in counts.items():
        assert (reads > 0) == (loss is not None) == (update in (5, 10, 12))


def test_the_same_run_comes_of_it(late, package, run_of_all, tmp_path):
    overrides = [*QUICK, "log.every=5", "train.checkpoint_every=4"]
    resumed = pulled_and_resumed(package, overrides, 10, str(tmp_path / "run"))
    assert same(resumed, run_of_all)
    lines = [json.loads(line) for line in (resumed.folder / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (run_of_all.folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["update"]: line["loss"] for line in lines if "loss" in line}
    expected = {line["update"]: line["loss"] for line in before if "loss" in line}
    assert found == {update: expected[update] for update in (5, 10, 12)}


def test_no_state_is_saved_after_a_loss_that_is_not_finite(late, package, tmp_path):
    (tmp_path / "d.py").write_text(
        "import torch\n"
        "class Data(list): pass\n"
        "def data(part):\n"
        "    bad = torch.full((1, 8, 8), float('nan'))\n"
        "    return Data({'image': bad if i == 3 else torch.zeros(1, 8, 8), 'label': i % 10} for i in range(16))\n"
    )
    data = ["data.source=d.py:data", "train.batch=8", "data.validation=null", "train.order=rotate"]
    every = ["log.every=100", "train.checkpoint_every=6"]
    with pytest.raises(DBConvertError, match="not finite for 1 of 8") as caught:
        dbconvert.train(str(package), overrides=[*QUICK, *data, *every], out="run")
    assert "block-" in caught.value.where and "sigma" in caught.value.where
    assert "more were made before losses were read" in caught.value.where
    assert not list((tmp_path / "run" / "checkpoints").glob("update-*"))


def test_unread_losses_are_read_now_and_then(tmp_path):
    unit = partial(type, "unit", ())({"name": "block-0", "done": 0})
    watch = Watch(tmp_path, late=True, told=False)
    losses = torch.tensor([1.0, torch.nan])
    for update in range(1, 1000):
        watch.saw(unit, update, losses.mean(), losses, torch.ones(2))
    with pytest.raises(DBConvertError, match="1 of 2") as caught:
        watch.saw(unit, 1000, losses.mean(), losses, torch.ones(2))
    assert "update 1 of the run" in caught.value.where and "999 more" in caught.value.where
