"""Sites whose modulation is kept from pass to pass."""

import pytest
import torch

from dbconvert.anatomy import Axes, GateSite, NormSite
from dbconvert.graph.inject import Site


@pytest.mark.parametrize(("shape", "groups"), [((3, 2, 4), (2,)), ((3, 6, 4), (2,)), ((3, 5, 4), ()), ((6, 4), (2,))])
@pytest.mark.parametrize("kind", ["norm", "gate"])
def test_rows_are_laid_out_once_and_act_as_ever(shape, groups, kind):
    axes = Axes(0, -1)
    at = NormSite("n", "", 4, axes) if kind == "norm" else GateSite("g", "", 4, axes)
    site, values = Site(at), torch.randn(2, *shape)
    if kind == "norm":
        site.shift, site.scale = torch.randn(2, 3, *groups, 4)
    else:
        site.by = torch.randn(3, *groups, 4)
    plain = [site.act(value) for value in values]
    site.filled = {}
    for value, expected in zip(values, plain, strict=True):
        assert torch.allclose(site.act(value), expected, atol=1e-6)
        assert len(site.filled) == 1
    other = torch.randn(3, 12, 4)
    expected = site.act(other), len(site.filled)
    site.filled = None
    assert torch.allclose(expected[0], site.act(other), atol=1e-6) and expected[1] == 2
