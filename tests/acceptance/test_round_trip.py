"""Weights of every accepted row, cut into block files, put together again and loaded: the same network."""

import copy
import json

import pytest
import torch

from dbconvert.checkpoint import load_checkpoint, load_tensors, save_checkpoint, save_tensors
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.noise import edm_noise
from dbconvert.engine.package import PLAN_KEY
from dbconvert.engine.split import parts
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import inject
from dbconvert.graph.tape import tensors
from dbconvert.plan import SCHEMA_VERSION, NoiseRule, Plan, SourceRef, cut, parse_plan
from dbconvert.schema import to_json
from tests.acceptance.table import CONVERTED

WIDTH = 8
ROWS = {name: row for name, row in CONVERTED.items() if row.verdict != "looped"}


def plan_for(anatomy):
    rule = NoiseRule(rule="edm")
    source = SourceRef("model_file", "build_model", "m.py", ("m.py",), "")
    return Plan(
        schema_version=SCHEMA_VERSION, versions={}, source=source,
        anatomy=anatomy, blocks=cut(anatomy.depth, blocks=2), start="original", condition_width=WIDTH, task=None,
        target=None, noise=rule, preview=edm_noise(rule, 2), weights="random, seed 0", pretrained=False, files={},
        shapes={},
    )  # fmt: skip


def blockwise(model, plan):
    run = inject(model, plan.anatomy, blocks=2, width=WIDTH, start=plan.start)
    return BlockwiseNetwork(model, run, None, plan, (0, 1), "shared")


def first_output(network, inputs):
    network.run.reset()
    network.run.condition = torch.ones(2, WIDTH)
    with torch.no_grad():
        return tensors(network.model(**inputs))[0][1]


@pytest.mark.parametrize("name", ROWS)
def test_round_trip(name, tmp_path):
    model, inputs = ROWS[name].build()
    plan = plan_for(analyse(model, inputs, stack=ROWS[name].stack))
    written = blockwise(copy.deepcopy(model), plan)
    for parameter in written.conditioning.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    merged = {}
    for file, part in parts(written, None).items():
        assert not set(part) & set(merged)
        save_tensors(tmp_path / file, part)
        merged.update(load_tensors(tmp_path / file))
    path = save_checkpoint(tmp_path / "model.safetensors", merged, {PLAN_KEY: to_json(plan)}, shard_bytes=10**5)
    loaded, metadata = load_checkpoint(path)
    again = parse_plan(json.loads(metadata[PLAN_KEY]), file=str(path))
    assert again == plan
    read = blockwise(scrambled(model), again)
    assert not torch.equal(first_output(read, inputs), first_output(written, inputs))
    read.load(loaded, where=str(path))
    assert torch.equal(first_output(read, inputs), first_output(written, inputs))


def scrambled(model):
    """Another network of the same make: whatever is not loaded shows."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return other
