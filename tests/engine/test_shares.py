"""What each block resolves, by the network's own cross-entropy over sigma."""

from types import SimpleNamespace

import pytest
import torch

from dbconvert.diffusion.entropy import fit_entropy, posterior_entropy
from dbconvert.diffusion.intervals import Intervals, boundaries
from dbconvert.engine.shares import cross_entropies, entropy_shares

TABLE = torch.nn.functional.normalize(torch.randn(12, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
PRIOR = torch.softmax(-torch.arange(12) / 4.0, 0)


class Task:
    def counted(self, labels):
        counted = torch.ones(labels.shape)
        counted[:, 0] = 0
        return counted

    def draw(self, inputs, *, generator):
        return torch.randn(*inputs["tokens"].shape, 16, generator=generator)


class Decoder:
    """The best reader of a noisy embedding, which is told nothing else; notes who was asked for which level."""

    task, plan = Task(), SimpleNamespace(context="raw")

    def __init__(self):
        self.asked = []

    def __call__(self, block, inputs, labels, sigma, eps, before):
        assert before is None
        self.asked.append((block, float(sigma[0])))
        z = TABLE[labels] + sigma[:, None, None] * eps
        scores = (z @ TABLE.T / sigma[:, None, None] ** 2 + PRIOR.log()).log_softmax(-1)
        losses = -scores.gather(-1, labels[..., None])[..., 0]
        losses[:, 0] = 1e6  # of positions that do not count
        return losses


def batches(count=20):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        tokens = torch.multinomial(PRIOR, 64 * 9, replacement=True, generator=generator).view(64, 9)
        yield {"tokens": tokens}, tokens


def intervals_of(partition, blocks=3):
    distribution = fit_entropy(TABLE, PRIOR).distribution
    return Intervals(distribution, tuple(boundaries(distribution, blocks, partition)))


@pytest.mark.parametrize("partition", ["equal-mass", "uniform"])
def test_of_the_best_reader_they_are_the_shares_of_the_fit(partition):
    """Its cross-entropy is the posterior entropy, to which the noise was fitted."""
    intervals, decoder = intervals_of(partition), Decoder()
    at = cross_entropies(decoder, intervals, batches(), intervals.boundaries, draws=2, seed=0)
    levels = torch.tensor(intervals.boundaries).double().log()
    assert at == pytest.approx(posterior_entropy(TABLE, PRIOR, levels, draws=20000, seed=1).tolist(), abs=0.03)
    shares = entropy_shares(at)
    assert sum(shares.values()) == pytest.approx(1)
    for block in range(3):
        assert shares[f"entropy_share_block_{block}"] == pytest.approx(intervals.share(block), abs=0.03)
    assert {block for block, level in decoder.asked if level == pytest.approx(intervals.boundaries[1])} == {2}
    assert {block for block, level in decoder.asked if level == pytest.approx(intervals.boundaries[-1])} == {0}


def test_the_same_noise_at_every_level():
    def measured(*levels):
        return cross_entropies(Decoder(), intervals_of("equal-mass"), batches(1), levels, draws=1, seed=3)

    assert measured(0.3)[0] == measured(0.2, 0.3, 0.4)[1]


def test_shares_of_what_the_blocks_resolve():
    assert entropy_shares([0.5, 1.0, 2.5]) == {"entropy_share_block_0": 0.75, "entropy_share_block_1": 0.25}
    assert entropy_shares([1.0, 0.8, 2.0])["entropy_share_block_1"] == pytest.approx(-0.2)
    assert entropy_shares([1.0, 1.0, 1.0]) == {}
