"""The sweep's table must not fall: some classes in every run of the tests, all of them with -m slow."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from dbconvert.errors import Refused
from tests.acceptance.classes import KINDS, build
from tests.acceptance.judge import judge, offered
from tests.acceptance.shrink import every_kind

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "docs" / "families.json").read_text())
QUICK = [
    ("causal", "llama"), ("causal", "gpt_neox"), ("causal", "gemma3_text"), ("causal", "mixtral"), ("causal", "olmo2"),
    ("causal", "falcon_h1"), ("causal", "doge"), ("masked", "albert"), ("masked", "bart"), ("masked", "modernbert"),
    ("image", "dinov2"), ("image", "swin"), ("image", "textnet"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "model_type"), QUICK, ids=lambda value: value)
def test_some_classes(kind, model_type):
    if model_type not in KINDS[kind]:
        pytest.skip("the installed Transformers has no such class")
    row, expected = judge(*build(kind, model_type)), TABLE["rows"][kind][model_type]
    assert (row.verdict, row.stack) == (expected["verdict"], expected.get("stack", ""))
    if row.verdict == "refused":
        assert row.reason and row.node


@pytest.mark.slow
def test_all_classes(tmp_path):
    if TABLE["versions"]["transformers"] != version("transformers"):
        pytest.skip("docs/families.json was written with another Transformers")
    command = [sys.executable, "-m", "tests.acceptance.sweep", "--json", str(tmp_path / "found.json")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    verdicts = {kind: {t: row["verdict"] for t, row in rows.items()} for kind, rows in found.items()}
    expected = {kind: {t: row["verdict"] for t, row in rows.items()} for kind, rows in TABLE["rows"].items()}
    assert verdicts == expected


def test_no_class_crashes():
    crashed = [t for rows in TABLE["rows"].values() for t, row in rows.items() if row["verdict"] == "crash"]
    assert crashed == []


def test_every_refusal_names_its_node():
    refused = [row for rows in TABLE["rows"].values() for row in rows.values() if row["verdict"] == "refused"]
    assert refused and all(row.get("node") and row["reason"] for row in refused)


def test_shortened_patterns_keep_every_kind():
    pattern = ["linear"] * 5 + ["full", "sliding"]
    kept = every_kind(pattern)
    assert set(kept) == set(pattern) and kept[0] == "linear" and len(kept) == 4


def test_stacks_are_read_from_hints():
    several = Refused("several", kind="several-stacks", hint="choose one with --stack PATH: a.b: 2 layers; c: 3 layers")
    shape = Refused("shape", kind="dimensions", hint="convert a part that keeps it: --stack a.b")
    assert offered(several) == ["a.b", "c"] and offered(shape) == ["a.b"]
    assert offered(Refused("given", kind="dimensions", facts={"stacks": ["x", "y"]})) == ["x", "y"]
    assert offered(Refused("none", kind="dimensions", hint="if there is one, name it with --stack PATH")) == []
