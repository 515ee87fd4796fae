"""Modulation: zero at the start, one row an example, whatever axes a layer folds together."""

import pytest
import torch

from dbconvert.anatomy import Axes
from dbconvert.conditioning.embedding import NoiseEmbedding
from dbconvert.conditioning.modulation import Modulation, fit, gate, modulate
from dbconvert.errors import DBConvertError


@pytest.mark.parametrize(("start", "value"), [("zero", 0.0), ("original", 1.0)])
def test_start(start, value):
    pairs, gates = Modulation(8, (4, 6), (4,), start)(torch.randn(3, 8))
    assert [tuple(t.shape) for pair in pairs for t in pair] == [(3, 4), (3, 4), (3, 6), (3, 6)]
    assert all(not t.any() for pair in pairs for t in pair) and torch.equal(gates[0], torch.full((3, 4), value))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 5, 4), Axes(0, -1)),
        ((5, 3, 4), Axes(1, -1)),
        ((3, 4, 2, 2), Axes(0, -3)),
        ((15, 4), Axes(0, -1)),
        ((4, 3), Axes(1, -2)),
    ],
)
def test_every_example_gets_its_row(shape, axes):
    x, rows = torch.randn(shape), torch.randn(3, 4)
    fitted = fit(rows, x, axes).expand(shape)
    channel_last = fitted.movedim((axes.batch, axes.channel), (0, -1))
    repeats = shape[axes.batch] // 3
    for example in range(3):
        chosen = channel_last[example * repeats : (example + 1) * repeats]
        assert torch.equal(chosen, rows[example].expand_as(chosen))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((3, 6, 4), Axes(0, -1)), ((6, 3, 4), Axes(1, -1)), ((3, 4, 6), Axes(0, -2)), ((18, 4), Axes(0, -1))],
)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_every_group_of_positions_gets_its_row(shape, axes, groups):
    x, shift, scale = torch.randn(shape), *torch.randn(2, 3, groups, 4)
    changed = modulate(x, shift, scale, axes)
    assert changed.shape == x.shape
    assert torch.allclose(gate(x, scale, axes), modulate(x, 0 * shift, scale - 1, axes), atol=1e-5)
    plain, done = (v if len(shape) == 2 else v.movedim((axes.batch, axes.channel), (0, -1)) for v in (x, changed))
    plain, done = plain.reshape(3, groups, -1, 4), done.reshape(3, groups, -1, 4)
    assert torch.allclose(done, plain * (1 + scale[:, :, None]) + shift[:, :, None], atol=1e-6)


def test_positions_without_an_axis_of_their_own_are_refused():
    with pytest.raises(DBConvertError, match="no single axis of positions"):
        gate(torch.randn(3, 2, 6, 4), torch.randn(3, 2, 4), Axes(0, -1))


def test_formula():
    """AdaLN: x (1 + scale) + shift, then the gate (DiT, section 3.2)."""
    x, shift, scale, by = torch.randn(2, 3, 4), *torch.randn(3, 2, 4)
    axes = Axes(0, -1)
    expected = by[:, None] * (x * (1 + scale[:, None]) + shift[:, None])
    assert torch.allclose(gate(modulate(x, shift, scale, axes), by, axes), expected)
    assert modulate(x.bfloat16(), shift, scale, axes).dtype == torch.bfloat16


def test_noise_levels_are_told_apart():
    torch.manual_seed(0)
    embedded = NoiseEmbedding(16)(torch.linspace(-1.5, 1.1, 50)).detach()
    distances = torch.cdist(embedded, embedded) + torch.eye(50)
    assert embedded.shape == (50, 16) and float(distances.min()) > 1e-3
