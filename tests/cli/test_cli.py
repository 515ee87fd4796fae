"""The installed command, as a user runs it: results, JSON, exit codes, one clear message for each mistake."""

import json
import os
from dataclasses import fields
from inspect import signature
from pathlib import Path

import commands
import pytest
from commands import as_json, dbconvert
from engine.conftest import write_model

from dbconvert.cli.main import guarded, split
from dbconvert.recipe import SplitOptions

NOT_RESIDUAL = """
from torch import nn
def build_model():
    layer = lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*[layer() for _ in range(3)]))
"""


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "m")


def test_the_three_lines_on_the_front_page(model):
    split = as_json("split", model, "--blocks", 3, "--data", "digits", "-o", "pkg", "--json")
    assert split["blocks"] == [[0, 1], [2, 3], [4, 4]] and split["package"] == "pkg"
    assert split["noise"]["boundaries"] == sorted(split["noise"]["boundaries"]) and split["noise"]["sigma_data"] > 0
    steps = ["train.steps=3", "train.batch=32"]
    assert "trainable" in dbconvert("train", "pkg", *steps, "--dry-run").stdout
    assert "finished runs/pkg-001" in dbconvert("train", "pkg", *steps).stdout
    assert "wrote model.safetensors" in dbconvert("assemble").stdout
    found = as_json("eval", "model.safetensors", "eval.draws=1", "--json")
    assert found["examples"] == 300 and 0 <= found["metrics"]["accuracy_zero"] <= 1
    assert "accuracy_zero" in dbconvert("eval", "runs/pkg-001", "--part", "validation", "eval.draws=0").stdout
    for block in range(3):
        dbconvert("train", "pkg", "--block", block, *steps, "train.periphery=frozen-target")
    runs = [f"runs/pkg-block{b}-001" for b in range(3)]
    dbconvert("assemble", *runs, "-o", "parts.safetensors")
    assert as_json("eval", "parts.safetensors", "eval.draws=0", "--json")["examples"] == 300


def test_every_option_of_a_split_in_a_recipe_is_one_of_the_command(model, capsys):
    """But `times`, a mapping, which a diffusers folder says itself."""
    assert {field.name for field in fields(SplitOptions)} - {"times"} <= signature(split).parameters.keys()
    asked = ["--entry", "append", "--readout", "pooled", "--modulation", "silu"]
    assert guarded(["split", str(model), "--data", "digits", "--dry-run", *asked], debug=False) == 0
    shown = capsys.readouterr().out
    assert "enters as one token more" in shown and "pooled" in shown and "SiLU" in shown


def test_inspect_accepts(model):
    found = as_json("inspect", model, "--json")
    assert found["verdict"] == "accepted" and found["reason"] is None
    assert (found["stack"], found["layers"], found["width"], found["streams"]) == ("layers", 5, 16, 1)
    assert all(check["passed"] for check in found["anatomy"]["proof"])
    text = dbconvert("inspect", model).stdout
    assert "…" not in text
    for word in ("accepted", "layers", "norm1", "attention.projection", "stem", "readout", "identity"):
        assert word in text


def test_inspect_refuses(tmp_path):
    (tmp_path / "bad.py").write_text(NOT_RESIDUAL)
    done = dbconvert("inspect", "bad.py", "--json", code=1)
    found = json.loads(done.stdout)
    assert found["verdict"] == "refused" and "not residual" in found["reason"] and found["node"]
    assert {"stack", "layers", "width", "streams"} <= set(found)
    assert "not residual" in done.stderr and "bad.py" not in done.stdout.splitlines()[0]
    assert json.loads(dbconvert("split", "bad.py", "--json", code=1).stdout)["verdict"] == "refused"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "missing.py"], 2, "does not exist"),
        (["split", "m/model.py", "--blocks", "9"], 2, "9 blocks cannot be cut from 5 layers"),
        (["split", "m/model.py", "--layers", "2,2"], 2, "add up to 4"),
        (["split", "m/model.py", "--layers", "two"], 2, "not a list of whole numbers"),
        (["split", "m/model.py", "--noise", "loud"], 2, "noise.rule = 'loud'|rule = 'loud'"),
        (["split", "m/model.py", "--entry", "nose"], 2, "entry = 'nose': .*'append' or 'add'"),
        (["split", "m/model.py", "-o", "m"], 2, "exists already"),
        (["split", "m/model.py", "-o", "m", "--force"], 2, "not written by dbconvert"),
        (["split", "m/model.py", "--data", "nowhere", "--dry-run"], 2, "does not exist"),
        (["split", "m/model.py", "--weights", "none.pt", "--dry-run"], 1, "does not exist"),
        (["train", "nothing"], 2, "does not exist"),
        (["train", "m"], 2, "not a package"),
        (["train", "vit_digits", "train.stpes=3"], 2, "did you mean steps"),
        (["compare", "vit_digits", "--vary", "split.bloks=1,2"], 2, "did you mean blocks"),
        (["compare", "vit_digits", "-o", "m"], 2, "no comparison wrote"),
        (["assemble"], 1, "no complete run"),
        (["eval", "m"], 2, "neither a checkpoint nor a run"),
        (["inspect"], 2, "Missing argument"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_mistakes(model, tmp_path, arguments, code, message):
    import re

    before = sorted(p.name for p in tmp_path.rglob("*"))
    done = dbconvert(*arguments, code=code)
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_broken_model_shows_its_own_traceback(tmp_path):
    (tmp_path / "model.py").write_text("import torch\n\ndef build_model():\n    return torch.nn.Linear('a', 3)\n")
    done = dbconvert("inspect", "model.py", code=1)
    assert 'model.py", line 4' in done.stderr and "site-packages" not in done.stderr


def test_debug_shows_everything(tmp_path):
    (tmp_path / "model.py").write_text("def build_model():\n    return 1 / 0\n")
    for arguments in (["--debug", "inspect", "model.py"], ["inspect", "model.py", "--debug"]):
        assert "dbconvert/engine/opening.py" in dbconvert(*arguments, code=1).stderr


def test_a_full_disk(model, tmp_path):
    """A file size limit stands for a disk that fills up while weights are written."""
    import subprocess

    command = f"ulimit -f 8; exec {commands.COMMAND} split {model} -o pkg"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 1 and "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*pkg*"))


def test_help_does_not_load_torch():
    import subprocess
    import sys

    code = (
        "import sys\nfrom dbconvert.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    for command in ("inspect", "split", "train", "assemble", "eval", "compare", "demo"):
        assert command in dbconvert("--help").stdout and dbconvert(command, "--help").stdout
    assert dbconvert("--version").stdout.strip()


def test_the_packages_own_script(model):
    import subprocess
    import sys

    dbconvert("split", model, "--data", "digits", "-o", "pkg")
    command = [sys.executable, "pkg/train.py", "train.steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and Path("runs/pkg-001/run.json").exists(), done.stderr


def test_inspect_names_function_calls(tmp_path):
    (tmp_path / "inline.py").write_text(
        """import torch
from torch import nn
from torch.nn import functional as F

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return x + F.linear(F.layer_norm(x, (16,)), self.weight)

def build_model():
    return nn.Sequential(nn.Linear(8, 16), *[Layer() for _ in range(3)], nn.Linear(16, 3))

def example_inputs():
    return torch.randn(2, 5, 8)
"""
    )
    shown = dbconvert("inspect", tmp_path / "inline.py").stdout
    assert "layer_norm() in" in shown and "linear() in" in shown and "sites at function calls" in shown
