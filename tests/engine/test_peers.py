"""compare --against peers: its rows, what they hold and reach on the way, and what is not here."""

import json
import mmap
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from engine.conftest import QUICK, pulled_and_resumed

import dbconvert
from dbconvert.cli.main import guarded
from dbconvert.data.batches import Spread
from dbconvert.engine import compare as comparing
from dbconvert.engine import grid
from dbconvert.engine.against import PEERS
from dbconvert.engine.cell import memory_figures, run_cell
from dbconvert.engine.comparison import COLUMNS, Comparison, Point, Row
from dbconvert.engine.grid import Request, lay_out, parse_vary
from dbconvert.engine.memory import MemoryReport, UnitMemory
from dbconvert.engine.peaks import Peaks, anonymous
from dbconvert.events import Advance, Stage
from dbconvert.schema import parse

DIGITS = Path(__file__).parents[2] / "docs" / "digits" / "table.json"
PARTS = ("peak_parameters", "peak_gradients", "peak_optimizer", "activations")
MB = 2**20
FEW = ["train.steps=22", "train.batch=16", "eval.draws=1", "eval.sigmas=0"]


def laid_out(target, *vary, overrides=()):
    return lay_out(Request(str(target), tuple(overrides), parse_vary(vary), 1, ("peers",)), {})


# -- the rows -------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_package_with_what_makes_them(package):
    found = {one.cell.name: one for one in laid_out(package, overrides=QUICK)}
    assert list(found) == ["blocks", "end-to-end", "shallow control", *(peer.name for peer in PEERS)]
    assert [one.cell.optional for one in found.values()] == [False] * 3 + [True] * len(PEERS)
    for one in found.values():
        assert one.recipe.data.validation == "test" and one.recipe.eval.every == 0.1 and one.recipe.log.every == 10
        assert one.recipe.train.steps == 4
    lean = found["end-to-end, checkpointing, 8-bit, in backward"].recipe
    assert lean.train.checkpointing and lean.train.clip is None and lean.train.method == "end-to-end"
    assert (lean.optimizer.name, lean.optimizer.in_backward) == ("adamw8bit", True)
    away = found["blocks, inactive on disk, checkpointing, 8-bit"].recipe
    assert (away.train.inactive, away.train.order, away.train.steps_per_turn) == ("disk", "rotate", 20)
    assert away.train.checkpointing and away.optimizer.name == "adamw8bit" and away.train.method == "blocks"
    assert found["BAdam-style"].recipe.train.steps_per_turn == 20 and found["LoRA"].recipe.train.method == "lora"


def test_a_row_is_laid_out_once_for_all_that_does_not_matter_to_it():
    varied = laid_out("vit_digits", "split.blocks=2,3", "noise.overlap=0,0.1", "train.checkpointing=false,true")
    names = [one.cell.name for one in varied]
    assert sum(name.startswith("end-to-end, checkpointing, 8-bit") for name in names) == 1
    assert sum(name.startswith("LoRA") for name in names) == 2
    assert sum(name.startswith("BAdam-style") for name in names) == 4
    assert sum(name.startswith("blocks, inactive in host memory") for name in names) == 8


def test_they_do_not_change_what_other_words_compare(package):
    plain = lay_out(Request(str(package), tuple(QUICK), {}, 1), {})
    assert all(one.recipe.data.validation is None and one.recipe.eval.every == 0 for one in plain)


# -- what comes of them ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(package, tmp_path_factory):
    """Some of the rows, run in this process, without torchao."""
    out = tmp_path_factory.mktemp("peers") / "out"
    chosen = tuple(one for one in PEERS if one.name in ("BAdam-style", "LoRA", "blocks, inactive on disk"))
    lean = next(one for one in PEERS if "8-bit" in one.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grid.AGAINST, "peers", (*chosen, lean))
        patch.setattr(grid, "WATCHED", ("eval.every=0.3", "eval.examples=70", "log.every=10"))
        patch.setattr(comparing, "spawn", lambda place: run_cell(place) and 0)
        patch.setitem(sys.modules, "torchao", None)
        patch.setitem(sys.modules, "torchao.optim", None)
        code = guarded(["compare", str(package), *FEW, "--against", "peers", "-o", str(out)], debug=False)
    data = json.loads((out / "table.json").read_text())
    return code, out, {row["cell"]["name"]: row for row in data["rows"]}


def test_what_is_not_here_is_said_and_is_no_failure(compared):
    code, out, rows = compared
    assert code == 0
    assert {name for name, row in rows.items() if row["status"] != "done"} == {"LoRA", lean_name()}
    assert rows["LoRA"]["status"] == "not here" and "starts from scratch" in rows["LoRA"]["reason"]
    assert "torchao" in rows[lean_name()]["reason"]
    table = (out / "table.md").read_text()
    assert "| LoRA | not here: train.method=lora adds to a pretrained network" in table
    assert f"- not here: {lean_name()}, seed 0: optimizer.name=adamw8bit needs torchao" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and (out / "table.png").read_bytes().startswith(b"\x89PNG")


def lean_name():
    return next(one for one in PEERS if "8-bit" in one.name).name


def test_memory_is_split_by_what_it_is_for(compared):
    figures = {name: row["figures"] for name, row in compared[2].items() if row["status"] == "done"}
    for one in figures.values():
        assert one["peak"] == sum(one[part] for part in PARTS) and "other" not in one
        assert one["host"] is None or one["host"] >= 0  # memory that earlier tests left is used again
    whole, blocks = figures["end-to-end"], figures["blocks"]
    away, badam = figures["blocks, inactive on disk"], figures["BAdam-style"]
    assert whole["peak_parameters"] == whole["peak_gradients"] == 4 * whole["parameters"] == badam["peak_parameters"]
    assert (
        badam["peak_gradients"] < 0.6 * whole["peak_gradients"] and badam["peak_optimizer"] < badam["peak_parameters"]
    )
    assert blocks["peak_gradients"] == away["peak_gradients"] < 0.5 * blocks["peak_parameters"]
    assert away["peak_parameters"] == away["peak_gradients"] and 2 * away["peak_optimizer"] < blocks["peak_optimizer"]
    assert blocks["epoch"] == pytest.approx(3 * blocks["step"] * (1197 // 16), rel=0.1)
    assert whole["epoch"] == pytest.approx(whole["step"] * (1197 // 16), rel=0.1)


def test_on_a_cuda_device_the_allocator_tells_the_peak_and_the_rest_is_other():
    unit = UnitMemory("network", trainable=10, state=160, activations=500)
    report = MemoryReport((unit,), used_parameters=10, resident_parameters=25, resident_state=220)
    most = {"parameters": 40, "gradients": 40, "optimizer": 80, "spare": 60}
    lines = [{"holds": {**most, "optimizer": 0}}, {"holds": most}, {"update": 2, "eval": {}}]
    peaks = Peaks(device=True)
    peaks.device, peaks.host = 1000, 7
    found = memory_figures(report, lines, peaks)
    assert (found["peak"], found["other"], found["host"], found["parameters"]) == (940, 280, 7, 10)
    assert [found[part] for part in PARTS] == [40, 40, 80, 500]
    peaks.device = 600  # activations are gone before the last gradients are there
    found = memory_figures(report, lines, peaks)
    assert (found["peak"], found["other"]) == (660, 0)


def test_quality_on_the_way_is_told_at_equal_time(compared):
    _, out, rows = compared
    for name, updates in (("blocks", [20, 40, 60, 66]), ("end-to-end", [7, 14, 21, 22])):
        curve = rows[name]["curve"]
        assert [point["update"] for point in curve] == updates
        assert all(a["seconds"] < b["seconds"] for a, b in pairwise(curve))
        assert all(round(70 * point["quality"]["accuracy from z = 0"], 3).is_integer() for point in curve)
        assert rows[name]["examples"] == 300
    header = (out / "table.md").read_text().splitlines()[0]
    assert "| accuracy from z = 0, at equal time |" in header and "state held" not in header


def test_equal_time_is_that_of_end_to_end_training(package):
    def row(name, baseline, *points):
        cell = {"name": name, "baseline": baseline, "varied": {}, "seed": 0, "part": "test", "identity": name}
        told = [{"update": u, "seconds": s, "quality": {"q": q}} for u, s, q in points]
        kinds = [{"title": "q", "share": True}]
        quality = {"q": points[-1][-1]}
        return parse(
            Row, {"cell": cell, "status": "done", "qualities": kinds, "quality": quality, "curve": told}, file=""
        )

    rows = (
        row("blocks", None, (1, 3.0, 0.2), (2, 9.0, 0.9)),
        row("end-to-end", "end-to-end", (1, 2.0, 0.3), (2, 4.0, 0.5)),
        row("late", "late", (1, 5.0, 0.4)),
    )
    found = Comparison("t", Path(), {}, rows, 0)
    assert found.equal_time == {0: 4.0} and rows[0].curve[0] == Point(1, 3.0, {"q": 0.2})
    assert found.table() == (
        ["training", "q", "q, at equal time"],
        [["blocks", "90.0 %", "20.0 %"], ["end-to-end", "50.0 %", "50.0 %"], ["late", "40.0 %", "-"]],
    )
    assert any("within 4.0 s (seed 0)" in note for note in found.notes())


def test_tables_of_the_older_form_are_read():
    found = json.loads(DIGITS.read_text())
    rows = tuple(parse(Row, row, file="table.json") for row in found["rows"])
    headers, lines = Comparison(found["target"], Path(), found["varied"], rows, 0).table()
    assert {"state in use", "state held", "activations"} <= set(headers) and "peak memory" not in headers
    assert dict(zip(headers, lines[0], strict=True)).items() <= found["table"][0].items()
    assert len({column.title for column in COLUMNS}) == len(COLUMNS)


# -- how it is looked at --------------------------------------------------------------------------------------------


def test_peaks_are_those_of_updates(monkeypatch):
    resident = [100 * MB]
    monkeypatch.setattr("dbconvert.engine.peaks.anonymous", lambda: resident[0])
    peaks = Peaks(device=False)

    def hold(size):
        resident[0] = size
        time.sleep(0.2)
        resident[0] = 101 * MB

    with peaks:
        peaks(Stage("training", 2))
        peaks(Advance(1))  # goes on from update 1
        hold(140 * MB)
        peaks(Advance(1))
        hold(260 * MB)  # an evaluation
        peaks(Advance(0))
        peaks(Advance(1))
    assert peaks.host == 40 * MB and peaks.device is None and not peaks.thread.is_alive()


@pytest.mark.skipif(anonymous() is None, reason="the system does not tell")
def test_what_is_allocated_is_resident():
    with mmap.mmap(-1, 40 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        before = anonymous()
        for page in range(0, 40 * MB, mmap.PAGESIZE):
            held[page] = 1
        assert 35 * MB < anonymous() - before < 45 * MB


def test_some_examples_are_spread_over_the_part():
    part = Rows(10)
    assert [Spread(part, 4).__getitems__([0, 3]), len(Spread(part, 4)), len(Spread(part, 99))] == [[0, 7], 4, 10]
    assert Spread(part, 99).__getitems__([9]) == [9] and Spread(part, 4).characters_per_token is None


class Rows(list):
    def __init__(self, count):
        super().__init__(range(count))

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def test_evaluations_come_by_shares_and_time_goes_on_where_it_was(package, tmp_path):
    asked = [*QUICK, "train.steps=8", "train.method=end-to-end", "eval.every=0.25", "train.checkpoint_every=3"]
    run = pulled_and_resumed(package, asked, 5, str(tmp_path / "run"))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if "eval" in line] == [2, 4, 6, 8]
    spent = [line["trained"] for line in lines]
    assert spent == sorted(spent) and spent[0] > 0
    with pytest.raises(dbconvert.errors.UsageError, match=r"eval\.every"):
        dbconvert.train(str(package), overrides=[*QUICK, "eval.every=1.5"], out=str(tmp_path / "other"))
