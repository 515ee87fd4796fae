"""Optimisers: 8-bit state, bf16 weights, steps in the backward pass; counted, saved and resumed to the bit."""

import sys

import pytest
import torch
from engine.conftest import QUICK, pulled_and_resumed
from torch import nn

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.engine import compiling, optimizers
from dbconvert.engine.optimizers import GROUP, make_optimizer, state_bytes, state_size
from dbconvert.engine.units import Unit
from dbconvert.errors import UsageError
from dbconvert.recipe import OptimizerOptions

SHAPES = ((64, 64), (96, 48), (64,), (17, 300), (2, 5))


@pytest.fixture(autouse=True)
def uncompiled():
    """What torchao compiles runs as it is written: kernels for every shape would take minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {str(i): nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for i, s in enumerate(SHAPES)}


def stepped(made, options, updates=3):
    optimizer = make_optimizer(made, options)
    for _ in range(updates):
        for parameter in made.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return optimizer


def storages(value):
    inner = [getattr(value, name) for name in optimizers.CODES] if hasattr(value, "codes") else [value]
    return sum(tensor.untyped_storage().nbytes() for tensor in inner)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_takes_the_bytes_that_are_counted(name, dtype):
    if (name, dtype) == ("sgd", torch.bfloat16):
        pytest.skip("refused")
    made, options = parameters(dtype), OptimizerOptions(name=name)
    optimizer = stepped(made, options)
    found = sum(
        storages(value) for state in optimizer.state.values() for slot, value in state.items() if slot != "step"
    )
    sizes = {key: p.numel() * p.element_size() for key, p in made.items()}
    assert found == sum(state_size(p.numel(), name, p.element_size()) for p in made.values())
    assert state_bytes(made.values(), options) == 2 * sum(sizes.values()) + found
    alone = OptimizerOptions(name=name, in_backward=True)
    assert state_bytes(made.values(), alone) == sum(sizes.values()) + max(sizes.values()) + found


def test_8_bits_are_a_quarter_of_32():
    eight, thirty_two = (state_size(1_000 * GROUP, name) for name in ("adamw8bit", "adamw"))
    assert 0.25 < eight / thirty_two < 0.26


def test_updates_below_half_of_the_last_bit_are_not_lost_in_bf16():
    """1 - 2^-10 is no bf16: rounded to the nearest, nothing would be left of any number of such updates."""
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    options = OptimizerOptions(lr=2.0**-10, weight_decay=0.0)
    torch.manual_seed(0)
    stepped({"weight": weight}, options, updates=64)
    assert weight.detach().float().mean().item() == pytest.approx(1 - 64 * 2.0**-10, abs=2e-3)


def test_a_step_in_the_backward_pass_is_the_same_step():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    twin = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    twin.load_state_dict(network.state_dict())
    units = [
        Unit("block-0", dict(model.named_parameters()), OptimizerOptions(in_backward=early), total=4)
        for model, early in ((network, False), (twin, True))
    ]
    for update in range(4):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(update))
        for model, unit in zip((network, twin), units, strict=True):
            unit.prepare_update()
            model(x).square().mean().backward()
            if model is twin:
                assert all(p.grad is None for p in model.parameters())
            unit.optimizer.step()
            unit.finish_update()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), twin.parameters(), strict=True))


EIGHT = ["optimizer.name=adamw8bit"]
BACKWARD = ["optimizer.in_backward=true", "train.clip=null"]
TRUE = ["train.precision=bf16-true"]


@pytest.mark.parametrize("asked", [EIGHT, TRUE, [*EIGHT, *BACKWARD, *TRUE]], ids=["8bit", "bf16", "all"])
def test_a_run_goes_on_to_the_bit(asked, package, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "SMALL_TENSOR", 256)
    monkeypatch.setattr("torchao.optim.adam._AdamBase._new_buffer", small_buffers)
    overrides = [*QUICK, *asked, "train.checkpoint_every=2"]
    whole = dbconvert.train(str(package), overrides=overrides, out=str(tmp_path / "whole"))
    resumed = pulled_and_resumed(package, overrides, 7, str(tmp_path / "resumed"))
    assert same_weights_of_blocks(whole, resumed)
    kind = torch.bfloat16 if "train.precision=bf16-true" in asked else torch.float32
    found = load_tensors(whole.folder / "weights" / "block-0.safetensors")
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {kind}


def small_buffers(self, parameter, signed):
    """Tensors of a tiny network are kept in 8 bits too."""
    if self.block_size != GROUP or parameter.numel() % GROUP:
        return torch.zeros_like(parameter)
    return self._subclass_zeros(parameter, signed, self.block_size)


def same_weights_of_blocks(one, other):
    files = sorted(path.name for path in (one.folder / "weights").iterdir())
    return all(
        torch.equal(a[key], b[key])
        for a, b in ([load_tensors(run.folder / "weights" / name) for run in (one, other)] for name in files)
        for key in a
    )


def test_bf16_weights_are_put_together_and_evaluated(package, tmp_path):
    out, checkpoint = str(tmp_path / "run"), tmp_path / "model.safetensors"
    run = dbconvert.train(str(package), overrides=[*QUICK, *TRUE, "eval.every=4"], out=out)
    dbconvert.assemble([out], out=str(checkpoint))
    found = dbconvert.evaluate(str(checkpoint), part="validation", overrides=["eval.draws=1", "eval.sigmas=2"])
    assert found.metrics["loss_zero"] == pytest.approx(run.metrics["loss_zero"], rel=0.02)


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optimizer.in_backward=true"], "contradicts train.clip=1"),
        ([*BACKWARD, "train.accumulate=2"], "contradicts train.accumulate=2"),
        ([*TRUE, "optimizer.name=sgd"], "rounds stochastically"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides, told, package, tmp_path):
    with pytest.raises(UsageError, match=told):
        dbconvert.train(str(package), overrides=[*QUICK, *overrides], out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", [EIGHT, TRUE])
def test_a_missing_extra_is_named(asked, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UsageError, match="needs torchao") as raised:
        dbconvert.train(str(package), overrides=[*QUICK, *asked], out=str(tmp_path / "run"))
    assert "dbconvert[8bit]" in str(raised.value.hint)
    assert not (tmp_path / "run").exists()


def test_devices_and_processes_without_support_are_refused(monkeypatch):
    options = OptimizerOptions(name="adamw8bit", in_backward=True)
    recipe = dbconvert.recipe.Recipe(source="model.py", optimizer=options)
    with pytest.raises(UsageError, match="does not run on mps"):
        optimizers.refuse_unsupported(recipe, torch.device("mps"), 1)
    with pytest.raises(UsageError, match="2 processes"):
        optimizers.refuse_unsupported(recipe, torch.device("cpu"), 2)
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match="does not run on cpu"):
        optimizers.refuse_unsupported(recipe, torch.device("cpu"), 1)
