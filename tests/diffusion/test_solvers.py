"""Solvers: exact where the flow is known, and the same as diffusers'."""

from importlib.util import find_spec

import pytest
import torch

from dbconvert.diffusion.distributions import LogNormal
from dbconvert.diffusion.solvers import Course, solver

NOISE = LogNormal()
SPREAD = 0.7


def gaussian(z, level):
    """D for data of N(1, SPREAD^2), whose flow is 1 + (z_0 - 1) sqrt(SPREAD^2 + s^2)/sqrt(SPREAD^2 + s_0^2)."""
    return 1 + (z - 1) * SPREAD**2 / (SPREAD**2 + level**2)


def through(way, start, denoise):
    course = Course(start)
    for i, level in enumerate(way.levels):
        course = way.move(course, i, denoise(course.z, level))
    return course.z


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp-2m", 2)])
def test_the_error_falls_as_it_should(name, order):
    """With twice the evaluations by about 2^order."""
    start = torch.tensor([80.0, -30.0, 5.0], dtype=torch.float64)
    exact = 1 + (start - 1) * SPREAD / (SPREAD**2 + 80.0**2) ** 0.5
    few, many = ((through(solver(name, NOISE, n, "karras"), start, gaussian) - exact).abs().max() for n in (64, 128))
    assert 2 ** (order - 0.5) < few / many < 2 ** (order + 0.6)


@pytest.mark.parametrize(
    ("name", "steps", "used"), [("euler", 50, 50), ("heun", 50, 49), ("heun", 1, 1), ("dpmpp-2m", 7, 7)]
)
@pytest.mark.parametrize("grid", ["quantiles", "karras"])
def test_evaluations_descend_over_the_whole_range(name, steps, used, grid):
    levels = solver(name, NOISE, steps, grid).levels
    assert len(levels) == used and levels == sorted(levels, reverse=True) and levels[0] == 80.0
    assert used == 1 or levels[-1] == 0.002


def test_the_last_evaluation_is_what_comes_out():
    for name in ("euler", "heun", "dpmpp-2m"):
        way = solver(name, NOISE, 5, "quantiles")
        told = [torch.tensor([float(i)]) for i in range(len(way.levels))]
        course = Course(torch.ones(1))
        for i, estimate in enumerate(told):
            course = way.move(course, i, estimate)
        assert torch.allclose(course.z, told[-1])


@pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
def test_the_same_as_diffusers():
    from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

    start = torch.tensor([[[[40.0, -7.0]]]], dtype=torch.float64)
    theirs = {
        "euler": EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
        "dpmpp-2m": EDMDPMSolverMultistepScheduler(
            sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, solver_order=2, lower_order_final=False
        ),
    }
    for name, scheduler in theirs.items():
        scheduler.set_timesteps(12)
        z = start.clone()
        for level, t in zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps, strict=True):
            root = (level**2 + 0.25) ** 0.5
            raw = (gaussian(z, level) - 0.25 / root**2 * z) / (level * 0.5 / root)
            scheduler.scale_model_input(z, t)
            z = scheduler.step(raw, t, z).prev_sample
        ours = through(solver(name, NOISE, 12, "karras"), start, gaussian)
        assert torch.allclose(ours, z, rtol=1e-4), name
