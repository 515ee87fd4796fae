"""Calls of torch's attention as they are met and made: by F.scaled_dot_product_attention, or by FlexAttention on CUDA.

FlexAttention skips the blocks of a mask that hide everything, which of [clean ; noisy] are more than half. Its block
masks are computed once for each mask, and masks that depend on the length alone are kept from pass to pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from dbconvert.plan import Kernel

ATTENTION = F.scaled_dot_product_attention
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

SMALLEST_HEAD = 16
"""Channels a head that FlexAttention's kernels take at least."""


def attention_arguments(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of torch's attention by name."""
    return {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}


class Attending(TorchFunctionMode, ABC):
    """Meets every call of torch's attention, also by nn.MultiheadAttention, which calls it where no mode looks.

    That gives no attention weights meanwhile, since it would attend in a way of its own for them.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is ATTENTION:
            return self.attend(attention_arguments(args, given))
        if func is F.multi_head_attention_forward and "need_weights" in given:
            with instead(lambda *args, **kwargs: self.attend(attention_arguments(args, kwargs))):
                return func(*args, **{**given, "need_weights": False})
        return self.other(func, args, given)

    @abstractmethod
    def attend(self, given: dict[str, Any]) -> Tensor:
        """What becomes of a call of attention, by its arguments."""

    def other(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What becomes of a call of another function."""
        return func(*args, **kwargs)


@contextmanager
def instead(attention: Callable[..., Tensor]) -> Iterator[None]:
    """torch.nn.functional calls this in the place of its own attention meanwhile."""
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = ATTENTION


def attend(given: dict[str, Any], mask: Tensor, kernel: Kernel = "auto") -> Tensor:
    """Attention with a mask in the place of the one that a call gives.

    Args:
        given: the arguments of F.scaled_dot_product_attention by name.
        mask: bool or added to the scores, [..., Q, K].
    """
    if flexes(given, mask, kernel):
        return flexed(given, mask)
    given = {**given, "attn_mask": mask, "is_causal": False}
    out: Tensor = ATTENTION(**given)
    return out


def flexes(given: dict[str, Any], mask: Tensor, kernel: Kernel) -> bool:
    """Whether a call goes to FlexAttention, which knows neither dropout nor gradients of masks."""
    query = given["query"]
    if kernel == "sdpa" or (kernel == "auto" and not (query.is_cuda and has_triton())):
        return False
    plain = query.dim() == 4 and not given.get("dropout_p") and not mask.requires_grad
    return plain and all(given[name].shape[-1] >= SMALLEST_HEAD for name in ("query", "value"))


@cache
def has_triton() -> bool:
    from torch.utils._triton import has_triton as found

    return bool(found())


def flexed(given: dict[str, Any], mask: Tensor) -> Tensor:
    query = given["query"]
    attention: Any = compiled() if query.is_cuda else flex_attention
    out: Tensor = attention(
        query,
        given["key"],
        given["value"],
        score_mod=None if mask.dtype == torch.bool else added(mask),
        block_mask=block_mask(mask),
        scale=given.get("scale"),
        enable_gqa=bool(given.get("enable_gqa")),
    )
    return out


@cache
def compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


BLOCK_MASKS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def block_mask(mask: Tensor) -> BlockMask:
    """Which blocks of scores a mask leaves, computed once for every mask tensor."""
    if mask not in BLOCK_MASKS:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        look = picked(seen)
        examples, heads = (n if n > 1 else None for n in four(seen).shape[:2])
        queries, keys = seen.shape[-2:]
        BLOCK_MASKS[mask] = create_block_mask(look, examples, heads, queries, keys, device=seen.device)
    found: BlockMask = BLOCK_MASKS[mask]
    return found


def four(mask: Tensor) -> Tensor:
    return mask.view(*[1] * (4 - mask.dim()), *mask.shape)


def picked(mask: Tensor) -> Callable[..., Tensor]:
    """The value of a mask [..., Q, K] for example b, head h, query q and key k."""
    whole = four(mask)
    per_example, per_head = (int(n > 1) for n in whole.shape[:2])
    return lambda b, h, q, k: whole[b * per_example, h * per_head, q, k]


def added(mask: Tensor) -> Callable[..., Tensor]:
    look = picked(mask)
    return lambda score, b, h, q, k: score + look(b, h, q, k)
