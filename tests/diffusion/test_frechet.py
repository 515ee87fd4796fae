"""The Frechet distance, against closed forms and a formula without matrix roots."""

import math

import pytest
import torch
from scipy.linalg import sqrtm

from dbconvert.diffusion.frechet import Gatherer, Moments, frechet_distance


def draw(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gathered(features, batch=7):
    gatherer = Gatherer()
    for part in features.split(batch):
        gatherer.add(part)
    return gatherer.moments()


def by_singular_values(first, second):
    """tr (C_1 C_2)^(1/2) is the nuclear norm of A B^T, where A^T A and B^T B are the covariances."""
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (first, second))
    apart = (first.mean(0) - second.mean(0)).square().sum()
    return float(apart + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def test_moments_do_not_depend_on_the_batches():
    features = draw(50, 5) @ draw(5, 5, 1) + 1e6
    whole = gathered(features)
    torch.testing.assert_close(whole.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(whole.covariance, features.T.cov(), rtol=1e-8, atol=0)
    for batch in (1, 3, 50):
        torch.testing.assert_close(gathered(features, batch).covariance, whole.covariance, rtol=1e-8, atol=0)


def test_gaussians_with_commuting_covariances_have_a_closed_form():
    rotation = torch.linalg.qr(draw(6, 6))[0]
    means, scales = (draw(6, 1, seed)[:, 0] for seed in (1, 2)), (draw(6, 1, seed)[:, 0].abs() for seed in (3, 4))
    (m1, m2), (s1, s2) = means, scales
    first, second = (Moments(m, rotation @ torch.diag(s**2) @ rotation.T, 100) for m, s in ((m1, s1), (m2, s2)))
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n1", "n2", "width"), [(200, 300, 8), (10, 12, 32), (2, 3, 16), (300, 9, 16)])
def test_distances_agree_with_singular_values(n1, n2, width):
    """Also where the covariances are singular."""
    first, second = draw(n1, width) @ draw(width, width, 1) + 0.3, draw(n2, width, 2)
    found = frechet_distance(gathered(first), gathered(second))
    assert found == pytest.approx(by_singular_values(first, second), rel=1e-6)
    assert frechet_distance(gathered(second), gathered(first)) == pytest.approx(found, rel=1e-6)


def test_distances_agree_with_the_root_of_the_product():
    first, second = gathered(draw(200, 8) @ draw(8, 8, 1)), gathered(draw(200, 8, 2) + 1)
    root = torch.as_tensor(sqrtm((first.covariance @ second.covariance).numpy()).real)
    expected = (first.mean - second.mean).square().sum() + (first.covariance + second.covariance - 2 * root).trace()
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-10)


def test_the_distance_to_itself_is_zero_and_to_a_point_is_what_is_around_it():
    moments = gathered(draw(20, 4))
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-9)
    point = gathered(moments.mean.repeat(5, 1))
    assert frechet_distance(moments, point) == pytest.approx(float(moments.covariance.trace()), rel=1e-6)


def test_few_examples_are_told_and_one_is_refused():
    assert gathered(draw(8, 8)).deficient and not gathered(draw(9, 8)).deficient
    assert torch.linalg.matrix_rank(gathered(draw(8, 8)).covariance) == 7
    with pytest.raises(ValueError, match="1 examples have no covariance"):
        gathered(draw(1, 8))
    with pytest.raises(ValueError, match="8 and 4 features"):
        frechet_distance(gathered(draw(9, 8)), gathered(draw(9, 4)))
