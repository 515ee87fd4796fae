"""Linear maps of two rows."""

import pytest
import torch
from torch.nn import functional as F

from dbconvert.graph.rows import of_two_rows


@pytest.mark.parametrize("shape", [(1, 2, 6), (2, 1, 6), (2, 6), (1, 1, 6), (3, 6), (6,)])
@pytest.mark.parametrize("bias", [True, False])
def test_two_rows_are_mapped_as_torch_maps_them(shape, bias):
    x, weight, added = torch.randn(shape), torch.randn(5, 6), torch.randn(5) if bias else None
    found = of_two_rows(x, weight, added)
    assert found.is_contiguous() and torch.allclose(found, F.linear(x, weight, added), atol=1e-5)
    assert of_two_rows(x, weight=weight, bias=added).shape == (*shape[:-1], 5)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_torch(kind):
    x, weight = torch.randn(2, 6, dtype=kind), torch.randn(5, 6, dtype=kind)
    assert torch.equal(of_two_rows(x, weight), F.linear(x, weight))


def test_two_rows_read_a_weight_once(monkeypatch):
    seen = []
    monkeypatch.setattr("dbconvert.graph.rows.LINEAR", lambda *given: seen.append(given) or F.linear(*given))
    of_two_rows(torch.randn(2, 6), torch.randn(5, 6))
    assert not seen
    of_two_rows(torch.randn(3, 6), torch.randn(5, 6))
    assert len(seen) == 1
