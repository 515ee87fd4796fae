"""What must hold of any noise distribution, its intervals and the preconditioning."""

import math

import pytest
import torch

from dbconvert.diffusion.distributions import LogNormal, Tabulated
from dbconvert.diffusion.entropy import closed_form, fit_entropy, posterior_entropy, rms_deviation
from dbconvert.diffusion.intervals import Intervals, boundaries, stratified
from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.diffusion.sampling import euler_step, levels, sigma_grid
from dbconvert.errors import DBConvertError, UsageError


def unit_table(classes, width):
    table = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(table, dim=-1)


DISTRIBUTIONS = {
    "edm": LogNormal(),
    "narrow": LogNormal(0.3, 0.4, 0.1, 10),
    "auto": fit_entropy(unit_table(10, 64), torch.ones(10)).distribution,
    "flat table": Tabulated((-1.0, 0.0, 1.0, 2.0), (0.0, 0.5, 0.5, 1.0), math.exp(-1), math.exp(2)),
}


@pytest.fixture(params=DISTRIBUTIONS)
def distribution(request):
    return DISTRIBUTIONS[request.param]


def test_cdf_and_icdf_are_inverse_and_monotone(distribution):
    q = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = distribution.icdf(q)
    assert bool((sigma.diff() >= 0).all())
    assert torch.allclose(distribution.cdf(sigma), q, atol=1e-9)
    ends = torch.tensor([distribution.sigma_min / 2, distribution.sigma_max * 2])
    assert distribution.cdf(ends).tolist() == [0, 1]


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_equal_mass(distribution, blocks):
    intervals = Intervals(distribution, tuple(boundaries(distribution, blocks)))
    assert [intervals.share(b) for b in range(blocks)] == pytest.approx([1 / blocks] * blocks, abs=1e-9)


@pytest.mark.parametrize("partition", ["equal-mass", "uniform"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 12])
def test_no_gap_without_overlap_and_every_block_runs(distribution, blocks, partition):
    intervals = Intervals(distribution, tuple(boundaries(distribution, blocks, partition)), overlap=0.0)
    assert intervals.training(0)[1] == distribution.sigma_max
    assert intervals.training(blocks - 1)[0] == distribution.sigma_min
    for block in range(blocks - 1):
        assert intervals.training(block)[0] == intervals.training(block + 1)[1]
    served = [intervals.block_of(sigma) for sigma in levels(intervals)]
    assert served == [*range(blocks), blocks - 1]


def test_uniform_is_uniform_in_log_sigma():
    edges = torch.tensor(boundaries(LogNormal(), 4, "uniform")).log()
    assert torch.allclose(edges.diff(), edges.diff()[0].expand(4))


def test_ties_and_clamps():
    intervals = Intervals(LogNormal(), tuple(boundaries(LogNormal(), 3)))
    low, inner, outer, high = intervals.boundaries
    assert [intervals.block_of(s) for s in (low, inner, outer, high)] == [2, 2, 1, 0]
    assert intervals.block_of(inner * (1 + 9e-7)) == 2 and intervals.block_of(inner * (1 + 1e-5)) == 1
    assert intervals.block_of(float(torch.tensor(outer, dtype=torch.float32))) == 1
    assert intervals.block_of(low / 10) == 2 and intervals.block_of(high * 10) == 0


def test_draws_stay_in_the_training_interval(distribution):
    intervals = Intervals(distribution, tuple(boundaries(distribution, 3)), overlap=0.1)
    for block in range(3):
        drawn = intervals.draw(block, stratified(512))
        low, high = intervals.training(block)
        assert drawn.dtype == torch.float32 and drawn.shape == (512,)
        assert low * (1 - 1e-5) <= float(drawn.min()) and float(drawn.max()) <= high * (1 + 1e-5)


def test_stratified_covers_every_cell():
    drawn = stratified(100, torch.Generator().manual_seed(0))
    assert sorted((drawn * 100).floor().int().tolist()) == list(range(100))


@pytest.mark.parametrize("sigma_data", [0.5, 0.036, 3.0])
def test_preconditioning_identities(sigma_data):
    scaling = Preconditioning(sigma_data)
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    # Karras et al. 2022, appendix B.6: unit input variance, unit target variance, weight 1 / c_out^2.
    assert torch.allclose(scaling.c_in(sigma) ** 2 * (sigma**2 + sigma_data**2), torch.ones_like(sigma))
    assert torch.allclose(scaling.c_out(sigma) ** 2, sigma**2 * scaling.c_skip(sigma))
    assert torch.allclose(scaling.weight(sigma) * scaling.c_out(sigma) ** 2, torch.ones_like(sigma))
    target_variance = ((1 - scaling.c_skip(sigma)) * sigma_data) ** 2 + (scaling.c_skip(sigma) * sigma) ** 2
    assert torch.allclose(target_variance, scaling.c_out(sigma) ** 2)


def test_euler_step_has_the_right_sign():
    """One step with the exact denoiser of a single point lands on that point's noised line; at 0 on the point."""
    y, eps = torch.tensor([1.0, -2.0]), torch.tensor([0.3, 0.7])
    z = euler_step(y + 5 * eps, y, 5.0, 2.0)
    assert torch.allclose(z, y + 2 * eps)
    assert torch.allclose(euler_step(z, y, 2.0, 0.0), y)
    edm = z + (0.5 - 2.0) * (z - y) / 2.0
    assert torch.allclose(euler_step(z, y, 2.0, 0.5), edm)


def test_karras_grid():
    grid = sigma_grid(LogNormal(), 5, "karras")
    roots = torch.tensor(grid) ** (1 / 7)
    assert grid[0] == 80 and grid[-1] == 0.002 and torch.allclose(roots.diff(), roots.diff()[0].expand(4), atol=1e-5)


class TestEntropy:
    def test_matches_two_points_in_closed_form(self):
        """Two labels at distance 2: a binary channel with Gaussian noise, whose entropy is an integral."""
        table = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        for sigma in (0.5, 1.0, 2.0):
            x = torch.linspace(-12, 12, 20001, dtype=torch.float64) * sigma
            density = torch.exp(-((x - 1) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
            p = torch.sigmoid(2 * x / sigma**2)
            binary = -(p * p.clamp_min(1e-300).log() + (1 - p) * (1 - p).clamp_min(1e-300).log())
            exact = float(torch.trapezoid(density * binary, x))
            log_sigma = torch.tensor([math.log(sigma)])
            found = float(posterior_entropy(table, torch.ones(2), log_sigma, draws=20000, seed=0))
            assert found == pytest.approx(exact, abs=0.01)

    def test_range_is_where_lab_notes_put_it(self):
        """LAB.md 1: sigma in about [0.15..0.2, 4..6.5] for unit-norm tables, whatever the width."""
        for classes, width in ((10, 64), (100, 128), (100, 768)):
            fitted = fit_entropy(unit_table(classes, width), torch.ones(classes)).distribution
            assert 0.14 < fitted.sigma_min < 0.23 and 4 < fitted.sigma_max < 6.7

    def test_scales_with_the_table(self):
        small = fit_entropy(unit_table(10, 16), torch.ones(10))
        large = fit_entropy(50 * unit_table(10, 16), torch.ones(10))
        assert large.distribution.sigma_min == pytest.approx(50 * small.distribution.sigma_min, rel=1e-3)
        assert large.sigma_data == pytest.approx(50 * small.sigma_data, rel=1e-4)

    def test_sigma_data_is_the_rms_deviation(self):
        table = unit_table(1000, 64)
        assert rms_deviation(table, torch.ones(1000)) == pytest.approx(1 / 8, rel=0.01)
        assert rms_deviation(table + 7, torch.ones(1000)) == pytest.approx(1 / 8, rel=0.01)

    def test_labels_that_never_occur_do_not_count(self):
        frequencies = torch.tensor([1.0] * 5 + [0.0] * 5)
        table = unit_table(10, 16)
        assert fit_entropy(table, frequencies) == fit_entropy(table[:5], torch.ones(5))

    def test_several_labels_are_opened_one_by_one(self):
        table, frequencies = unit_table(10, 16), torch.tensor([3.0, 1, 0, *[2] * 7])
        one = fit_entropy(table, frequencies)
        same = fit_entropy(torch.stack([table] * 4), torch.stack([frequencies] * 4))
        assert same.distribution == one.distribution
        assert same.entropy == pytest.approx(4 * one.entropy, rel=1e-5)
        assert same.sigma_data == pytest.approx(2 * one.sigma_data, rel=1e-5)
        fixed = torch.tensor([5.0, *[0] * 9])
        assert fit_entropy(torch.stack([table, -table]), torch.stack([frequencies, fixed])) == one
        assert closed_form(50, 16, 4).sigma_data == 2 * closed_form(50, 16).sigma_data == 0.5

    def test_one_label_is_refused(self):
        with pytest.raises(DBConvertError, match="at least two labels"):
            fit_entropy(unit_table(3, 4), torch.tensor([9.0, 0, 0]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogNormal(sigma_min=0.0),
        lambda: LogNormal(sigma_min=2, sigma_max=1),
        lambda: LogNormal(p_std=0),
        lambda: Tabulated((0.0, 1.0), (0.5, 0.5), 1.0, 2.0),
        lambda: Intervals(LogNormal(), (1.0, 0.5, 2.0)),
        lambda: Intervals(LogNormal(), (0.1, 1.0), overlap=-1),
        lambda: boundaries(LogNormal(), 0),
        lambda: sigma_grid(LogNormal(), 0),
    ],
)
def test_impossible_noise_is_refused(make):
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize(("labels", "width"), [(100, 32), (2000, 64)])
def test_the_closed_form_is_about_the_fit(labels, width):
    fitted, told = fit_entropy(unit_table(labels, width), torch.ones(labels)), closed_form(labels, width)
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    ratio = told.distribution.icdf(quantiles) / fitted.distribution.icdf(quantiles)
    assert bool((ratio.log().abs() < 0.25).all()), ratio
    assert told.sigma_data == pytest.approx(fitted.sigma_data, rel=0.05)
    assert told.entropy == pytest.approx(fitted.entropy, rel=1e-3)


def test_a_large_table_is_fitted_with_fewer_draws(monkeypatch):
    small = fit_entropy(unit_table(300, 32), torch.ones(300))
    monkeypatch.setattr("dbconvert.diffusion.entropy.LARGE", 300 * 200)
    large = fit_entropy(unit_table(300, 32), torch.ones(300))
    middle = torch.tensor([0.5], dtype=torch.float64)
    assert float(large.distribution.icdf(middle)) == pytest.approx(float(small.distribution.icdf(middle)), rel=0.1)
