"""Reference numbers: computed with the reference implementation of arXiv 2506.14202 at EDM's defaults (golden.json)."""

import json
from pathlib import Path

import pytest
import torch

from dbconvert.diffusion.distributions import LogNormal
from dbconvert.diffusion.intervals import Intervals, boundaries
from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.diffusion.sampling import sigma_grid

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
P_NOISE = LogNormal()


@pytest.mark.parametrize("blocks", GOLDEN["block_sigmas"])
def test_boundaries(blocks):
    assert boundaries(P_NOISE, int(blocks)) == pytest.approx(GOLDEN["block_sigmas"][blocks], rel=1e-9)


@pytest.mark.parametrize("steps", GOLDEN["inference_sigmas"])
def test_grids(steps):
    # The reference computes these in float32.
    assert sigma_grid(P_NOISE, int(steps)) == pytest.approx(GOLDEN["inference_sigmas"][steps], rel=2e-7)


@pytest.mark.parametrize("row", GOLDEN["preconditioning"], ids=lambda row: str(row["sigma"]))
def test_preconditioning(row):
    scaling, sigma = Preconditioning(0.5), torch.tensor(row["sigma"], dtype=torch.float64)
    for name in ("c_skip", "c_out", "c_in", "c_noise", "weight"):
        assert float(getattr(scaling, name)(sigma)) == pytest.approx(row[name], rel=1e-12)


@pytest.mark.parametrize("row", GOLDEN["overlap"], ids=lambda row: f"B{row['B']}-{row['interval']}")
def test_overlap(row):
    intervals = Intervals(P_NOISE, tuple(boundaries(P_NOISE, row["B"])), row["gamma"])
    block = row["B"] - 1 - row["interval"]  # the reference counts intervals from the lowest noise
    assert intervals.training(block) == pytest.approx((row["lo"], row["hi"]), rel=1e-9)
