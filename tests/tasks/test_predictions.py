"""A network that predicts epsilon, v or a flow, wrapped: D(x, sigma) is its own denoised estimate."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from small_dit import inputs, network_of, small_dit

from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.diffusion.predictions import Prediction, Times
from dbconvert.engine.predicting import decide_prediction, taken_for, within_range
from dbconvert.errors import UsageError
from dbconvert.plan import NoiseRule, Target
from dbconvert.recipe import SplitOptions
from dbconvert.tasks.classification import Classification

LEVELS = 10
DIFFUSERS = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
"""Our name: diffusers'."""


def wrapped(options):
    """All layers in one block, as the original runs, in float64."""
    given = {name: value.double() if value.is_floating_point() else value for name, value in inputs().items()}
    return network_of(small_dit().double(), given, blocks=1, options=options), small_dit().double()


def estimate(network, z, sigma):
    label = torch.tensor([3, 7])
    return network.denoise(0, {"images": z, "label": label}, z, torch.full((2,), sigma, dtype=torch.float64))


@DIFFUSERS
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("kind", ["epsilon", "v"])
@torch.no_grad()
def test_epsilon_and_v_at_ten_levels(kind, betas):
    """Against diffusers' DDIM step, which tells the denoised sample."""
    from diffusers import DDIMScheduler

    options = SplitOptions(start="original", prediction=kind, times=Times(betas=betas, beta_end=0.015))
    network, original = wrapped(options)
    scheduler = DDIMScheduler(
        beta_start=0.0001, beta_end=0.015, beta_schedule=BETAS[betas], clip_sample=False,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[kind],
    )  # fmt: skip
    scheduler.set_timesteps(1000)
    sigmas = options.times.log_sigmas().exp()
    theirs = scheduler.alphas_cumprod.double()
    assert torch.allclose(sigmas, ((1 - theirs) / theirs).sqrt(), rtol=2e-3)  # their table is of 32 bits
    for t in torch.linspace(0, 990, LEVELS).long().tolist():
        x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
        out = original(x, torch.full((2,), t), torch.tensor([3, 7]))
        theirs = scheduler.step(out, t, x).pred_original_sample
        ours = estimate(network, x * (1 + sigmas[t] ** 2).sqrt(), float(sigmas[t]))
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * max(1, float(sigmas[t]))), t


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@torch.no_grad()
def test_flow_at_ten_levels(scale):
    """x_t = (1 - t) y + t eps, F = eps - y: y = x_t - t F, as in diffusers' FlowMatchEulerDiscreteScheduler."""
    options = SplitOptions(start="original", prediction="flow", times=Times(scale=scale))
    network, original = wrapped(options)
    for t in torch.linspace(0.002, 0.98, LEVELS).tolist():
        x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
        out = original(x, torch.full((2,), t * scale, dtype=torch.float64), torch.tensor([3, 7]))
        ours = estimate(network, x / (1 - t), t / (1 - t))
        assert torch.allclose(ours, x - t * out, rtol=1e-4, atol=1e-4), t  # the network rounds its time to float32


@pytest.mark.parametrize("kind", ["edm", "epsilon", "v", "flow"])
def test_a_network_that_knows_the_answer(kind):
    """Told y exactly, in its own terms, D is y; c_in x has the variance that it knows."""
    prediction, edm = Prediction(kind), Preconditioning(0.5)
    y, eps = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    sigma = torch.tensor([0.02, 0.3, 1.0, 5.0, 70.0], dtype=torch.float64)
    by, z = prediction.scalings(sigma, edm), y + sigma * eps
    left = 1 / (1 + sigma**2)
    told = {
        "edm": (y - edm.c_skip(sigma) * z) / edm.c_out(sigma),
        "epsilon": eps,
        "v": left.sqrt() * eps - (1 - left).sqrt() * y,
        "flow": eps - y,
    }[kind]
    assert torch.allclose(by.skip * z + by.out * told, y)
    seen = {
        "edm": z / (sigma**2 + 0.25).sqrt(),
        "flow": (1 - sigma / (1 + sigma)) * y + sigma / (1 + sigma) * eps,
    }.get(kind, left.sqrt() * y + (1 - left).sqrt() * eps)
    assert torch.allclose(by.into * z, seen)


def test_times_are_the_networks_own():
    for betas in BETAS:
        times = Times(betas=betas)
        grid = times.log_sigmas()
        between = (grid[100] + grid[101]) / 2
        found = Prediction("v", times).time(torch.stack([grid[0], grid[7], between, grid[-1]]).exp())
        assert torch.allclose(found, torch.tensor([0, 7, 100.5, 999], dtype=torch.float64))
    half = Prediction("flow", Times(scale=1000)).time(torch.tensor([1.0]))
    assert float(half) == 500.0


def test_levels_stay_within_what_was_trained():
    known = Target(0, 1, "image", prediction=Prediction("epsilon", Times(betas="scaled_linear", beta_end=0.012)))
    low, high = known.prediction.range()
    rule = within_range(NoiseRule(rule="edm"), known)
    assert (rule.sigma_min, rule.sigma_max) == (low, high) and high < 80
    assert within_range(NoiseRule(rule="edm", sigma_max=3.0), known).sigma_max == 3.0
    with pytest.raises(UsageError, match="beyond what the network was trained on"):
        within_range(NoiseRule(rule="edm", sigma_max=80.0), known)
    flow = Target(0, 1, "image", prediction=Prediction("flow"))
    assert within_range(NoiseRule(rule="edm"), flow) == NoiseRule(rule="edm")


def test_requests_that_cannot_be():
    network = network_of(small_dit(), inputs())
    plan = network.plan
    assert taken_for(plan) is None

    class Opened:
        source = type("S", (), {"prediction": staticmethod(lambda: None)})
        pretrained = True

    for options, task in (
        (SplitOptions(prediction="v"), Classification),
        (SplitOptions(times=Times()), type(network.task)),
    ):
        with pytest.raises(UsageError, match=r"split\.times"):
            decide_prediction(Opened, task, options)
    assert "split.prediction" in taken_for(replace(plan, pretrained=True))
