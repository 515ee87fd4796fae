"""What trials of a network put back, or leave out, meanwhile: modes, buffers, gradients, zero weights, fused paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


@contextmanager
def unchanged_state(model: nn.Module) -> Iterator[None]:
    """Modes, buffers (train-mode batch norms move theirs) and gradients are put back."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]


@contextmanager
def awake(model: nn.Module) -> Iterator[None]:
    """Weights that are zero throughout (zero-initialised projections and heads) block gradients: random meanwhile."""
    zeros = [p for p in model.parameters() if p.is_floating_point() and not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zeros:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def no_fast_paths() -> AbstractContextManager[None]:
    """torch's fused attention reads weights past the modules that hold them; it is off on both sides."""
    return fast_paths(False)


@contextmanager
def fast_paths(on: bool) -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(on)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
