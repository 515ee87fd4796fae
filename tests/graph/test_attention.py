"""FlexAttention and torch's own attention give the same for every kind of mask of [clean ; noisy] (forward, on CPU)."""

import pytest
import torch

from dbconvert.graph import attention
from dbconvert.graph.attention import attend
from dbconvert.graph.two_streams import lasting, noisy_rows, two_stream_mask

EXAMPLES, HEADS, LENGTH, CHANNELS = 2, 4, 13, 16


def alibi():
    place = torch.arange(LENGTH)
    distance = (place[None] - place[:, None]).float()
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)[:, None, None]
    return (slopes * distance).masked_fill(distance > 0, torch.finfo(torch.float32).min)[None]


def window():
    return (torch.ones(LENGTH, LENGTH).tril() - torch.ones(LENGTH, LENGTH).tril(-5)).bool()[None, None]


def documents():
    numbers = torch.tensor([[0] * 5 + [1] * 8, [0] * 9 + [1] * 4])
    return numbers[:, :, None] == numbers[:, None, :]


def causal():
    return torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()


MASKS = {
    "causal": lambda: two_stream_mask(causal()),
    "length alone": lambda: lasting(LENGTH, torch.device("cpu"), causal=True, noisy=False),
    "documents": lambda: two_stream_mask(causal(), documents()),
    "window": lambda: two_stream_mask(window()),
    "alibi": lambda: two_stream_mask(alibi()),
    "alibi, documents": lambda: two_stream_mask(alibi(), documents()),
    "noisy rows": lambda: noisy_rows(causal()),
    "noisy rows, documents": lambda: noisy_rows(causal(), documents()),
}


def call(mask, heads=HEADS):
    generator = torch.Generator().manual_seed(0)
    queries, keys = mask.shape[-2:]
    draw = lambda heads, length: torch.randn(EXAMPLES, heads, length, CHANNELS, generator=generator)  # noqa: E731
    return {"query": draw(HEADS, queries), "key": draw(heads, keys), "value": draw(heads, keys)}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", MASKS)
def test_both_kernels_agree(kind):
    mask = MASKS[kind]()
    given = call(mask)
    with torch.no_grad():
        plain, flex = attend(given, mask, "sdpa"), attend(given, mask, "flex")
    assert torch.allclose(flex, plain, atol=2e-6)
    assert not torch.allclose(plain, attend(given, torch.ones_like(mask[..., :1, :]).bool(), "sdpa"), atol=1e-2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_both_kernels_agree_on_shared_heads_and_scale():
    mask = MASKS["documents"]()
    given = {**call(mask, heads=2), "enable_gqa": True, "scale": 0.3}
    with torch.no_grad():
        assert torch.allclose(attend(given, mask, "flex"), attend(given, mask, "sdpa"), atol=2e-6)


def test_block_masks_are_computed_once_a_mask(monkeypatch):
    made = []
    plain = attention.create_block_mask
    monkeypatch.setattr(attention, "create_block_mask", lambda *args, **more: made.append(1) or plain(*args, **more))
    first, second = MASKS["causal"](), MASKS["causal"]()
    for mask in (first, first, second):
        attention.block_mask(mask)
    assert len(made) == 2
    kept = lasting(LENGTH, torch.device("cpu"), causal=True, noisy=False)
    assert kept is lasting(LENGTH, torch.device("cpu"), causal=True, noisy=False)


@pytest.mark.parametrize("change", [{"dropout_p": 0.1}, {"query": torch.randn(1, 2, 26, 8)}])
def test_what_flex_attention_cannot_do_goes_to_torchs_own(change):
    mask = MASKS["causal"]()
    assert attention.flexes(call(mask), mask, "flex")
    assert not attention.flexes({**call(mask), **change}, mask, "flex")
    assert not attention.flexes(call(mask), mask, "auto")
