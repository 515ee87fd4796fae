"""train.compile: one compilation for layers of equal structure, the same training to rounding, counted in the log."""

import json
from types import SimpleNamespace

import pytest
import torch
from engine.conftest import EXAMPLES, QUICK
from small_text import FOX

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.engine import compiling
from dbconvert.engine.requests import check_compile
from dbconvert.errors import UsageError
from dbconvert.plan import NoiseRule
from dbconvert.recipe import Recipe, TrainOptions

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
ON = "train.compile=true"
# Plain gradient descent: Adam's first updates are signs, which rounding may turn.
GENTLE = ["optimizer.name=sgd", "optimizer.lr=0.05", "train.steps=2", "eval.draws=0", "eval.sigmas=0"]


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """The graphs run without kernels being made, which would take a minute."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def weights(run):
    files = sorted((run.folder / "weights").iterdir())
    return {key: value for file in files for key, value in load_tensors(file).items()}


def lines(run):
    found = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def both(target, out, overrides):
    """The same training as it is written, and compiled."""
    asked = [*QUICK, *GENTLE, *overrides]
    return [
        dbconvert.train(str(target), overrides=[*asked, *more], out=str(out / str(len(more)))) for more in ([], [ON])
    ]


@pytest.mark.parametrize(
    "overrides",
    [[], ["train.method=end-to-end"], ["train.checkpointing=true"], ["train.periphery=frozen-target"]],
    ids=["blocks", "end-to-end", "checkpointing", "frozen-target"],
)
def test_training_is_the_same_and_compiles_once(package, tmp_path, overrides):
    plain, compiled = both(package, tmp_path, overrides)
    a, b = weights(plain), weights(compiled)
    assert a.keys() == b.keys()
    assert all(torch.allclose(b[key].float(), a[key].float(), atol=1e-5) for key in a)
    assert {line["compiled_graphs"] for line in lines(compiled)} == {1}
    assert all("compiled_graphs" not in line for line in lines(plain))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a:UserWarning")
def test_text_is_the_same(tmp_path):
    text = (EXAMPLES / "gpt.py").read_text()
    (tmp_path / "gpt.py").write_text(text.replace("depth=6, width=96", "depth=2, width=16"))
    (tmp_path / "fox.txt").write_text(FOX)
    data = ["data.source=fox.txt", "data.tokenizer=char", "data.length=16", "train.batch=8", "data.validation=null"]
    (tmp_path / "gpt.yaml").write_text("source: gpt.py\ntask: causal_lm\nsplit: {blocks: 2}\n")
    plain, compiled = both(tmp_path / "gpt.yaml", tmp_path, data)
    a, b = weights(plain), weights(compiled)
    assert all(torch.allclose(b[key].float(), a[key].float(), atol=1e-5) for key in a)
    assert len({line["compiled_graphs"] for line in lines(compiled)}) == 1


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["train.recompute_modulation=true", "train.method=forward-forward"])
def test_what_does_not_go_together_is_refused(asked, package, tmp_path):
    with pytest.raises(UsageError, match="does not go with"):
        dbconvert.train(str(package), overrides=[*QUICK, ON, asked], out=str(tmp_path / "run"))


def test_flex_attention_is_refused(monkeypatch):
    monkeypatch.setattr("dbconvert.engine.requests.task_of", lambda _: SimpleNamespace(doubled=True))
    with pytest.raises(UsageError, match=r"train\.attention=flex"):
        check_compile(None, Recipe(source="m.py", train=TrainOptions(compile=True, attention="flex")))


def test_a_machine_without_a_compiler_is_refused(package, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match="does not run on cpu"):
        dbconvert.train(str(package), overrides=[*QUICK, ON], out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_inductor_makes_the_same(package, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    plain, compiled = both(package, tmp_path, [])
    a, b = weights(plain), weights(compiled)
    assert all(torch.allclose(b[key].float(), a[key].float(), atol=1e-4) for key in a)


COMPILED = """
import torch
import torch.nn.functional as F
from torch import nn

def refuse(graph, inputs):
    raise AssertionError("compiled while it was analysed")

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    @torch.compile(backend=refuse)
    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))

def build_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *[Layer() for _ in range(4)], nn.Linear(16, 10))

def example_inputs():
    return torch.zeros(2, 1, 8, 8)
"""


def test_layers_that_compile_themselves_are_analysed_as_they_are_written(tmp_path):
    (tmp_path / "model.py").write_text(COMPILED)
    plan = dbconvert.split(str(tmp_path / "model.py"), noise=NoiseRule("edm"), dry_run=True).plan
    assert plan.anatomy.depth == 4 and plan.task == "classification"
