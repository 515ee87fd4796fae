"""Noise fitted again to the network's own cross-entropy: the fit, the run, stopped and resumed, and refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
from small_text import write_gpt

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.data.examples import LABEL
from dbconvert.diffusion.distributions import LogNormal, Tabulated
from dbconvert.diffusion.intervals import Intervals, boundaries
from dbconvert.diffusion.refit import KEPT, levels_of, refit, rising
from dbconvert.engine.load import load
from dbconvert.engine.loop import Loop
from dbconvert.engine.refit import points, sample_of
from dbconvert.errors import UsageError
from dbconvert.events import Note
from dbconvert.plan import NoiseFit
from dbconvert.recipe import SplitOptions
from dbconvert.schema import parse

# -- the fit ----------------------------------------------------------------------------------------------------


def test_the_nearest_rising_values():
    values = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 4.0, 6.0]).double()
    assert rising(values).tolist() == pytest.approx([1, 7 / 3, 7 / 3, 7 / 3, 4.5, 4.5, 6])
    assert rising(values.flip(0)).tolist() == pytest.approx([float(values.mean())] * 7, abs=1.2)
    ascending = torch.arange(5).double()
    assert torch.equal(rising(ascending), ascending)


BEFORE = LogNormal(-1.0, 1.5, 0.01, 10.0)


def curve(middle, spread, distribution=BEFORE):
    """A cross-entropy that rises around a level."""
    return 2.5 * torch.special.ndtr((levels_of(distribution).log() - middle) / spread)


def test_equal_steps_of_the_cross_entropy_give_equal_shares():
    middle = math.log(0.3)
    found = refit(BEFORE, curve(middle, 1.2))
    assert (found.sigma_min, found.sigma_max) == (0.01, 10.0)
    levels = torch.tensor([0.1, 0.3, 0.9]).double()
    own = torch.special.ndtr((levels.log() - middle) / 1.2)
    expected = (1 - KEPT) * own + KEPT * BEFORE.cdf(levels)
    assert found.cdf(levels).tolist() == pytest.approx(expected.tolist(), abs=0.01)
    ends = boundaries(found, 3)
    at = torch.special.ndtr((torch.tensor(ends).log() - middle) / 1.2)
    assert at.diff().tolist() == pytest.approx([1 / 3] * 3, abs=0.05)


def test_no_level_goes_untrained():
    steep = refit(Tabulated((-4.0, 2.0), (0.0, 1.0), math.exp(-4), math.exp(2)), torch.tensor([0.0] * 10 + [1.0] * 23))
    assert bool((torch.tensor(steep.mass).diff() > 0).all())


def test_idle_ends_move_in_and_others_stay():
    low = refit(BEFORE, curve(math.log(1.5), 0.5))
    assert 0.2 < low.sigma_min < 0.5 and low.sigma_max == 10.0
    high = refit(BEFORE, curve(math.log(0.05), 0.5))
    assert high.sigma_min == 0.01 and 0.1 < high.sigma_max < 0.3
    assert low.cdf(torch.tensor([low.sigma_min, low.sigma_max])).tolist() == [0, 1]


def test_nothing_to_fit_to():
    assert refit(BEFORE, torch.full((33,), 2.0)) is None
    assert refit(BEFORE, torch.linspace(3, 1, 33)) is None


def test_when():
    assert points((0.25, 0.5), 30) == {7, 15} and points((), 1) == frozenset()
    assert points((0.01,), 30) == {1} and points((0.99,), 30) == {29}
    with pytest.raises(UsageError, match="needs updates after it"):
        points((0.5,), 1)


def test_the_sample_is_the_same_every_time():
    class Data:
        def __len__(self):
            return 10000

        def __getitems__(self, indices):
            return {LABEL: torch.tensor(indices)[:, None].expand(-1, 64)}

    one, two = sample_of(Data(), 3), sample_of(Data(), 3)
    assert one.indices == two.indices != sample_of(Data(), 4).indices
    assert len(one) == 64 and one.__getitems__([5])[LABEL][0, 0] == one.indices[5]


# -- the run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refit")
    write_gpt(folder, depth=2)
    (folder / "recipe.yaml").write_text(
        "source: gpt.py\ntask: causal_lm\nsplit: {blocks: 2}\nnoise: {refit: [0.4, 0.7]}\n"
        "data: {source: fox.txt, tokenizer: char, length: 16, cache: cache}\n"
        "optimizer: {lr: 0.01}\ntrain: {steps: 10, batch: 8, checkpoint_every: 5}\n"
        "eval: {draws: 1, sigmas: 0}\nlog: {every: 1}\n"
    )
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(recipe):
    """An uninterrupted run of 20 updates, with noise fitted again after 8 and 14; its notes."""
    notes = []
    run = dbconvert.train(str(recipe), out=str(recipe.parent / "whole"), report=notes.append)
    return run, [event.text for event in notes if isinstance(event, Note)]


def noise_of(folder):
    return parse(NoiseFit, json.loads((Path(folder) / "noise.json").read_text()), file="noise.json")


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    found = {}
    for path in sorted((Path(folder) / "weights").glob("*.safetensors")):
        found.update(load_tensors(path))
    return found


def test_the_run_goes_on_with_the_new_noise(recipe, whole, tmp_path):
    run, notes = whole
    first = dbconvert.train(str(recipe), overrides=["noise.refit=[]", "train.steps=1"], out=str(tmp_path / "plain"))
    before, after = noise_of(first.folder), noise_of(run.folder)
    assert after.basis.endswith("after update 14 of the run, on training data") and after.rule == "auto"
    assert after.boundaries != before.boundaries and after.sigma_data == before.sigma_data
    assert [line["update"] for line in lines(run.folder) if "boundaries" in line] == [8, 14]
    assert "noise is fitted again after 40 % and 70 % of the updates" in notes
    refits = [note for note in notes if note.startswith("noise refitted")]
    assert (len(refits) == 2 and "range" in refits[0]) or "sigma_" in refits[0]
    info = json.loads((run.folder / "run.json").read_text())
    assert info["noise"] == after.identity and info["status"] == "complete"


def test_it_travels_into_the_checkpoint(recipe, whole, tmp_path):
    run, _ = whole
    path = dbconvert.assemble([str(run.folder)], out=str(tmp_path / "m.safetensors"))
    assert load(path).noise == noise_of(run.folder)
    given = [f"data.source={recipe.parent / 'fox.txt'}", "eval.draws=1", "eval.sigmas=0"]
    found = dbconvert.evaluate(str(path), part="validation", overrides=given)
    assert found.metrics == pytest.approx(run.metrics, rel=1e-5)


@pytest.mark.parametrize("stopped", [7, 9, 12, 16])
def test_stopped_anywhere_and_resumed_to_the_bit(recipe, whole, tmp_path, monkeypatch, stopped):
    """States are at 5, 10 and 15: before a refit that is made again, after one, between two, after both."""
    update = Loop.update

    def pulled(self, block, batch):
        if self.updates == stopped:
            raise KeyboardInterrupt
        return update(self, block, batch)

    monkeypatch.setattr(Loop, "update", pulled)
    with pytest.raises(KeyboardInterrupt):
        dbconvert.train(str(recipe), out=str(tmp_path / "r"))
    monkeypatch.undo()
    info = json.loads((tmp_path / "r" / "run.json").read_text())
    assert info["noise"] == noise_of(tmp_path / "r").identity
    found = dbconvert.train(str(recipe), resume=True, out=str(tmp_path / "r"))
    run, _ = whole
    assert found.metrics == run.metrics and noise_of(found.folder) == noise_of(run.folder)
    ours, theirs = weights(found.folder), weights(run.folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    kept = ("update", "loss", "boundaries")
    assert [{k: line.get(k) for k in kept} for line in lines(found.folder)] == [
        {k: line.get(k) for k in kept} for line in lines(run.folder)
    ]


def test_given_ends_stay(recipe, tmp_path):
    overrides = ["noise.sigma_min=0.001", "noise.sigma_max=50", "train.steps=4"]
    run = dbconvert.train(str(recipe), overrides=overrides, out=str(tmp_path / "run"))
    found = noise_of(run.folder)
    assert "update 5" in found.basis and (found.boundaries[0], found.boundaries[-1]) == (0.001, 50)


def test_of_pictures_too(package, model_file, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"source: {model_file}\nsplit: {{blocks: 3}}\nnoise: {{refit: [0.5]}}\ndata: {{source: digits}}\n"
        "train: {steps: 12, batch: 32}\noptimizer: {lr: 0.01}\neval: {draws: 1, sigmas: 0}\n"
    )
    run = dbconvert.train(str(tmp_path / "recipe.yaml"), out=str(tmp_path / "run"))
    found = noise_of(run.folder)
    assert "update 18" in found.basis
    assert sum(Intervals(found.distribution(), found.boundaries).share(b) for b in range(3)) == pytest.approx(1)


@pytest.mark.parametrize("method", ["end-to-end", "shallow"])
def test_baselines_have_no_noise_to_fit(recipe, tmp_path, method):
    run = dbconvert.train(str(recipe), overrides=[f"train.method={method}", "train.steps=2"], out=str(tmp_path / "r"))
    assert not any("boundaries" in line for line in lines(run.folder))


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "block", "message"),
    [
        (["noise.rule=edm"], None, "noise.refit fits noise `auto` again, and this one is `edm`"),
        (["task=masked_lm"], None, "noise.refit fits noise `auto` again, and this one is `mask`"),
        (["noise.refit=[0.5, 0.25]"], None, r"noise.refit \[0.5, 0.25\] are not shares"),
        (["noise.refit=[0]"], None, r"noise.refit \[0\] are not shares"),
        (["noise.refit=[1.0]"], None, r"noise.refit \[1\] are not shares"),
        (["noise.refit=[2]"], None, "noise.refit.0 = 2"),
        (["split.table=fresh", "train.periphery=frozen-target"], None, "needs all blocks trained together"),
        (["split.table=fresh", "train.periphery=frozen-target"], 0, "needs all blocks trained together"),
    ],
)
def test_where_it_cannot_be(recipe, tmp_path, overrides, block, message):
    with pytest.raises(UsageError, match=message) as error:
        dbconvert.train(str(recipe), overrides=overrides, block=block, out=str(tmp_path / "run"))
    assert error.value.hint or "noise.refit.0" in message
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_package_says_when(recipe, tmp_path):
    """Split by hand, trained from the package."""
    from dbconvert.plan import NoiseRule

    package = str(tmp_path / "package")
    rule = NoiseRule(rule="auto", refit=(0.5,))
    dbconvert.split(str(recipe.parent / "gpt.py"), out=package, options=SplitOptions(blocks=2), noise=rule)
    data = [f"data.source={recipe.parent / 'fox.txt'}", "data.tokenizer=char", "data.length=16"]
    overrides = [*data, "train.steps=2", "train.batch=8", "data.validation=null"]
    run = dbconvert.train(package, overrides=overrides, out=str(tmp_path / "run"))
    assert "update 2" in noise_of(run.folder).basis
