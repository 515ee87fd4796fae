"""LoRA on a pretrained start: additions learn, nothing else does; resumed to the bit, written as the network it was."""

import json
import sys

import pytest
import torch
from engine.conftest import bright_rows, pulled_and_resumed, same_weights
from safetensors.torch import save_file

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.engine.load import load
from dbconvert.errors import UsageError
from dbconvert.sources.python_files import load_file

pytest.importorskip("peft")
ASKED = ["split.blocks=2", "train.method=lora", "train.batch=48", "optimizer.lr=0.02", "data.validation=null"]


@pytest.fixture(scope="module")
def start(model_file, tmp_path_factory, quick_splits):
    folder = tmp_path_factory.mktemp("lora")
    recipe = bright_rows(folder, model_file)
    torch.manual_seed(0)
    save_file(load_file(folder / "vit.py").build_model().state_dict(), folder / "weights.safetensors")
    return recipe, folder / "weights.safetensors"


@pytest.fixture(scope="module")
def asked(start):
    return [*ASKED, f"weights={start[1]}", "train.steps=30", "log.every=1", "train.checkpoint_every=10"]


@pytest.fixture(scope="module")
def trained(start, asked, tmp_path_factory):
    return dbconvert.train(start[0], overrides=asked, out=str(tmp_path_factory.mktemp("lora") / "run"))


def test_it_learns_and_is_written_as_the_network_it_was(start, trained):
    before, after = load_tensors(start[1]), load_tensors(trained.folder / "weights" / "network.safetensors")
    assert set(before) == {key for key in after if not key.startswith("dbconvert.")}
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    layers = {
        key
        for key, value in before.items()
        if key.startswith("layers.") and key.endswith("weight") and value.dim() == 2
    }
    assert changed == layers
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    told = [line["loss"] for line in lines if "loss" in line]
    assert told[-1] < 0.7 * told[0]
    unit, held = trained.memory.units[0], lines[0]["holds"]
    assert held["gradients"] == 4 * unit.trainable < 0.8 * held["parameters"]
    assert load(trained.folder).network.training is False


def test_a_pulled_run_goes_on_to_the_same_weights(start, asked, trained, tmp_path):
    assert same_weights(pulled_and_resumed(start[0], asked, 13, str(tmp_path / "run")), trained)


def test_it_is_for_pretrained_networks(start, tmp_path):
    with pytest.raises(UsageError, match="starts from scratch"):
        dbconvert.train(start[0], overrides=[*ASKED, "train.steps=1"], out=str(tmp_path / "run"))


def test_without_peft(start, asked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"needs peft, which is not installed[\s\S]*dbconvert\[lora\]"):
        dbconvert.train(start[0], overrides=asked, out=str(tmp_path / "run"))
