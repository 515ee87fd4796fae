"""A converted ViT against the function that the paper's code computes, written here once more with plain functions."""

import math
from pathlib import Path

import pytest
import torch

from dbconvert.engine.convert import whole_network
from dbconvert.engine.package import open_package
from dbconvert.engine.split import split
from dbconvert.plan import NoiseRule
from dbconvert.recipe import SplitOptions

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
MODEL = """
def build_model():
    return ViT(size=8, patch=4, channels=3, classes=7, depth=3, width=16, heads=2)
"""
HEADS, PATCH, SIGMA_DATA, BLOCKS = 2, 4, 0.5, 3


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Converted as the reference is, with random numbers in the place of all weights, float64."""
    folder = tmp_path_factory.mktemp("reference")
    text = (ROOT / "examples" / "vit.py").read_text()
    (folder / "model.py").write_text(text[: text.index("def build_model")] + MODEL)
    options = SplitOptions(blocks=BLOCKS, start="zero", entry="replace", modulation="silu", condition_width=8)
    noise = NoiseRule(rule="edm", sigma_data=SIGMA_DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbconvert.engine.split.draw_noise", lambda *_: None)
        split(str(folder / "model.py"), out=str(folder / "package"), options=options, noise=noise)
    package = open_package(folder / "package")
    made = whole_network(package.plan, package.source()).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return made


# -- the reference ------------------------------------------------------------------------------------------------


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def norm(x, weights, name):
    x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(x, weights, name):
    q, k, v = linear(x, weights, f"{name}.qkv").chunk(3, -1)
    size = x.shape[-1] // HEADS
    heads = []
    for h in range(HEADS):
        own = slice(h * size, (h + 1) * size)
        seen = torch.softmax(q[..., own] @ k[..., own].mT / math.sqrt(size), -1)
        heads.append(seen @ v[..., own])
    return linear(torch.cat(heads, -1), weights, f"{name}.projection")


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def conditioning(sigma, weights, block):
    """SiLU(MLP(sinusoidal(c_noise)))."""
    c_noise = torch.log(sigma) / 4
    frequencies = torch.exp(torch.linspace(math.log(0.5), math.log(16.0), 16)).double()
    angles = c_noise[:, None] * frequencies
    hidden = linear(torch.cat([torch.cos(angles), torch.sin(angles)], -1), weights, f"dbconvert.embedder.{block}.mlp.0")
    return silu(linear(silu(hidden), weights, f"dbconvert.embedder.{block}.mlp.2"))


def layer(h, condition, weights, index):
    rows = silu(linear(condition, weights, f"dbconvert.modulation.{index}.linear"))[:, None]
    shift1, scale1, shift2, scale2, gate1, gate2 = rows.chunk(6, -1)
    name = f"layers.{index}"
    h = h + gate1 * attention(norm(h, weights, f"{name}.norm1") * (1 + scale1) + shift1, weights, f"{name}.attention")
    x = norm(h, weights, f"{name}.norm2") * (1 + scale2) + shift2
    return h + gate2 * linear(gelu(linear(x, weights, f"{name}.mlp.0")), weights, f"{name}.mlp.2")


def patches(images, weights):
    """Each patch as a row of numbers, channels first, through one linear."""
    n, channels, size, _ = images.shape
    cut = images.reshape(n, channels, size // PATCH, PATCH, size // PATCH, PATCH)
    rows = cut.permute(0, 2, 4, 1, 3, 5).reshape(n, (size // PATCH) ** 2, -1)
    return rows @ weights["patches.weight"].flatten(1).T + weights["patches.bias"]


def reference(images, z, sigma, weights, block):
    """Class scores of one block of one layer."""
    s, sd = sigma[:, None], SIGMA_DATA
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / torch.sqrt(s**2 + sd**2)
    condition = conditioning(sigma, weights, block)
    token = z / torch.sqrt(s**2 + sd**2)
    h = torch.cat([token[:, None], patches(images, weights)], 1) + weights["positions"]
    h = layer(h, condition, weights, block)
    denoised = c_skip * z + c_out * norm(h, weights, "norm")[:, 0]
    shift, scale = silu(linear(condition, weights, f"dbconvert.readout.{block}")).chunk(2, -1)
    return linear(denoised * (1 + scale) + shift, weights, "reference_head")


@pytest.mark.parametrize("block", range(BLOCKS))
def test_logits_and_loss_are_the_references(network, block):
    """Its head is the reference's over sigma_data, and its sinusoids are cosines before sines."""
    generator = torch.Generator().manual_seed(block)
    images = torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (5,), generator=generator)
    sigma = torch.rand(5, generator=generator, dtype=torch.float64) * 3 + 0.05
    eps = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    weights = dict(network.model.named_parameters())
    weights["reference_head.weight"] = weights["head.weight"] / SIGMA_DATA
    weights["reference_head.bias"] = weights["head.bias"]
    table = weights["dbconvert.target.weight"]
    clean = (table / table.norm(dim=-1, keepdim=True))[labels]
    z = clean + sigma[:, None] * eps
    with torch.no_grad():
        network.eval()
        expected = reference(images, z, sigma, weights, block)
        found = network.denoise(block, {"images": images}, z, sigma)
        assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-6
        losses = network(block, {"images": images}, labels, sigma, eps)
        by_hand = torch.logsumexp(expected, -1) - expected.gather(1, labels[:, None])[:, 0]
    assert (losses - by_hand).abs().max() < 1e-6


@pytest.mark.parametrize("changed", ["dbconvert.modulation.0.linear.bias", "positions", "dbconvert.readout.0.bias"])
def test_the_comparison_can_fail(network, changed):
    """The class token is not in it, and everything else is."""
    images, z, sigma = torch.ones(2, 3, 8, 8).double(), torch.ones(2, 16).double(), torch.ones(2).double()
    before = network.denoise(0, {"images": images}, z, sigma)
    parameter = network.model.get_parameter(changed)
    with torch.no_grad():
        network.model.get_parameter("cls_token").mul_(2)
        same = network.denoise(0, {"images": images}, z, sigma)
        before_that = parameter.clone()
        parameter.mul_(1.3)
        other = network.denoise(0, {"images": images}, z, sigma)
        parameter.copy_(before_that)
    assert torch.equal(before, same) and not torch.allclose(before, other)
