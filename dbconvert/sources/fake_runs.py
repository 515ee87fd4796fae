"""Running a network of any source on fake tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dbconvert.graph.fake import on_fake_tensors

EXPERTS = "transformers.integrations.moe"


@contextmanager
def runnable_on_fake(model: nn.Module) -> Iterator[FakeTensorMode]:
    """`on_fake_tensors`, with mixtures of experts made fit for it.

    torch's grouped matrix product refuses float32 on fake tensors, though not on real ones. Transformers' own
    fallback computes and saves the same, and knows fake tensors.
    """
    module = sys.modules.get(EXPERTS)
    with on_fake_tensors(model) as mode:
        if module is None or not hasattr(module, "_can_use_grouped_mm"):
            yield mode
            return
        with patch.object(module, "_can_use_grouped_mm", lambda *_: False):
            yield mode
