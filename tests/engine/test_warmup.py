"""The learning rate's warm-up: as a share of the training, or in updates of a block."""

import json
from pathlib import Path

import pytest
import yaml

import dbconvert
from dbconvert.engine import units
from dbconvert.errors import UsageError
from dbconvert.recipe import OptimizerOptions, Recipe
from dbconvert.schema import parse, to_yaml

EXAMPLES = Path(__file__).parents[2] / "examples"


def rates(count, total, warmup, pace=1):
    options = OptimizerOptions(warmup=warmup, schedule="constant")
    return [units.schedule(done, total, options, pace) for done in range(count)]


def test_a_whole_number_counts_updates():
    assert rates(6, 100, 4) == [0.25, 0.5, 0.75, 1, 1, 1] == rates(6, 10**6, 4)
    assert rates(3, 3, 2500) == [1 / 2500, 2 / 2500, 3 / 2500]


def test_anything_else_is_a_share():
    assert rates(6, 100, 0.04) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(2, 4, 1.0) == [0.25, 0.5] and rates(2, 4, 1) == [1, 1] == rates(2, 4, 0)


def test_what_is_updated_more_often_warms_up_for_as_long():
    assert rates(8, 400, 2, pace=4) == [n / 8 for n in range(1, 9)]


@pytest.mark.parametrize("given", [0.05, 1.0, 0, 1, 2500])
def test_both_kinds_survive_a_recipe(given):
    recipe = parse(Recipe, {"source": "m.py", "optimizer": {"warmup": given}}, file="r.yaml")
    again = parse(Recipe, yaml.safe_load(to_yaml(recipe)), file="r.yaml").optimizer.warmup
    assert again == given and (type(again) is type(given) or given == 0)


@pytest.mark.parametrize("given", [-1, 1.5, "long"])
def test_what_is_neither_is_refused(given):
    with pytest.raises(UsageError, match=r"^optimizer\.warmup = "):
        parse(Recipe, {"source": "m.py", "optimizer": {"warmup": given}}, file="r.yaml")


@pytest.mark.parametrize(("method", "paces"), [("blocks", {1, 3}), ("shallow", {3}), ("end-to-end", {1})])
def test_a_run_warms_up_in_updates_of_a_block(tmp_path, monkeypatch, method, paces):
    seen = set()
    real = units.schedule
    monkeypatch.setattr(units, "schedule", lambda d, t, o, pace=1: seen.add((t, pace)) or real(d, t, o, pace))
    overrides = ["train.steps=4", "optimizer.warmup=2", "optimizer.lr=1e-3", f"train.method={method}"]
    quick = ["train.batch=8", "log.every=1", "data.validation=null", "optimizer.schedule=constant"]
    result = dbconvert.train("vit_digits", overrides=[*overrides, *quick], out=str(tmp_path / "run"))
    assert seen == {(4 * pace, pace) for pace in paces}
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    first = [line["lr"] for line in lines if line["unit_update"] == 1]
    assert set(first) == {1e-3 / 6 if method == "shallow" else 5e-4}
    assert max(line["lr"] for line in lines) == 1e-3
