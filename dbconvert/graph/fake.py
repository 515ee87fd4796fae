"""Networks without numbers: built with empty weights, and run on fake tensors, which know shapes and types only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from dbconvert.errors import DBConvertError

NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""What a network raises on fake tensors when it asks for a value."""


FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
LARGE_TENSOR = 2**20
"""Elements (4 MiB in 32 bits). Larger tensors are not even made before they are emptied: those of one layer of experts
can take tens of GB."""


class _LargeOnMeta(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None:
            hollow = func(*args, **{**kwargs, "device": "meta"})
            if hollow.numel() > LARGE_TENSOR:
                return hollow
        return func(*args, **kwargs)


@contextmanager
def empty_weights() -> Iterator[None]:
    """Modules made meanwhile have their parameters on the meta device; buffers are real, but for very large ones.

    A parameter that is registered twice stays one parameter.
    """
    emptied: Any = WeakIdKeyDictionary()

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        if parameter not in emptied:
            emptied[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        kept: nn.Parameter = emptied[parameter]
        return kept

    hook = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]
    try:
        with _LargeOnMeta():
            yield
    finally:
        hook.remove()


class _TooLarge(DBConvertError):
    """Ends a build; an error of our own passes through a source's explanations unchanged."""


def build_up_to(build: Callable[[], nn.Module], limit: int) -> nn.Module | None:
    """What `build` makes, or None as soon as it has registered parameters of more than `limit` bytes."""
    total = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        total += 0 if parameter is None else parameter.numel() * parameter.element_size()
        if total > limit:
            raise _TooLarge("the network is large")

    hook = register_module_parameter_registration_hook(count)
    try:
        return build()
    except _TooLarge:
        return None
    finally:
        hook.remove()


def is_empty(model: nn.Module) -> bool:
    """Whether all parameters are on the meta device."""
    return all(parameter.is_meta for parameter in model.parameters()) and any(True for _ in model.parameters())


@contextmanager
def on_fake_tensors(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Parameters and floating buffers are fake CPU tensors meanwhile, and requires_grad stays as it is.

    Integers and flags (token and position numbers, masks) stay real, and no mode is entered: so the network takes
    the path that it takes on real weights wherever it looks at those.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            hollow = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
            trained = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(hollow, tensor.requires_grad) if trained else hollow
        return fakes[id(tensor)]

    replaced: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                replaced.append((tensors, dict(tensors)))
                for name, tensor in tensors.items():
                    if tensor is not None and (tensor.is_floating_point() or tensor.is_meta):
                        tensors[name] = fake(tensor)  # type: ignore[assignment]
        yield mode
    finally:
        for tensors, before in replaced:
            tensors.update(before)


def fake_like(mode: FakeTensorMode, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A fake CPU tensor."""
    hollow: Tensor = FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))
    return hollow
