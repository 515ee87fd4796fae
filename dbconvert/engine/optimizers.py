"""Optimisers: which there are, what their state takes and how it is kept, and steps in the backward pass."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dbconvert.engine.compiling import refuse_uncompiled
from dbconvert.errors import UsageError
from dbconvert.recipe import OptimizerName, OptimizerOptions, Recipe

SMALL_TENSOR, GROUP, TABLE = 4096, 256, 1024
"""torchao keeps the state of a tensor in 8 bits from so many elements on, if they fall into whole groups, with a 32-bit
scale a group and a table of so many bytes that says what each code means (Dettmers et al. 2022, arXiv 2110.02861)."""
CODES = ("codes", "scale", "qmap")
"""The tensors that such a state is made of."""


def make_optimizer(parameters: Mapping[str, nn.Parameter], options: OptimizerOptions) -> Optimizer:
    """Vectors (norms, biases) are not decayed, as is usual. Parameters in bf16 are rounded stochastically.

    Raises:
        UsageError: it needs an extra that is missing.
    """
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.betas[0])
    rounded = any(p.dtype is torch.bfloat16 for p in parameters.values())
    if options.name == "adamw" and not rounded:
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)
    offered = low_bit("optimizer.name=adamw8bit" if options.name == "adamw8bit" else "train.precision=bf16-true")
    kind = offered.AdamW8bit if options.name == "adamw8bit" else offered._AdamW
    made: Optimizer = kind(groups, lr=options.lr, betas=options.betas, bf16_stochastic_round=True)
    return made


def low_bit(wanted: str) -> ModuleType:
    """torchao's optimisers; `wanted` is the key that asks for them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it tells of kernels for other devices, which no optimiser uses
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchao.optim as offered
    except ImportError:
        raise UsageError(
            f"{wanted} needs torchao, which is not installed",
            why="its AdamW keeps state in 8 bits and rounds parameters in bf16 stochastically",
            hint="pip install 'dbconvert[8bit]'",
        ) from None
    finally:
        logging.disable(before)
    module: ModuleType = offered
    return module


def refuse_unsupported(recipe: Recipe, device: torch.device, processes: int) -> None:
    """What an optimiser cannot do on a device, or in several processes.

    Raises:
        UsageError: it is asked for.
    """
    options = recipe.optimizer
    if options.in_backward and processes > 1:
        raise UsageError(
            f"optimizer.in_backward does not run in {processes} processes",
            why="a gradient is used and freed as soon as it is there, before the processes could average it",
            hint="leave it out, or start one process",
        )
    if options.name == "adamw8bit" or recipe.train.precision == "bf16-true":
        wanted = "optimizer.name=adamw8bit" if options.name == "adamw8bit" else "train.precision=bf16-true"
        low_bit(wanted)
        refuse_uncompiled(wanted, device)


# -- state ----------------------------------------------------------------------------------------------------


def state_size(elements: int, optimizer: OptimizerName, word: int = 4) -> int:
    """Bytes of the moments that an optimiser keeps of a tensor: two (AdamW), or one (SGD's momentum).

    Args:
        word: bytes of an element of the tensor, and so of an unquantised moment.
    """
    if optimizer == "sgd":
        return word * elements
    if optimizer == "adamw" or elements < SMALL_TENSOR or elements % GROUP:
        return 2 * word * elements
    return 2 * (elements + 4 * elements // GROUP + TABLE)


def state_bytes(parameters: Iterable[nn.Parameter], options: OptimizerOptions) -> int:
    """Parameters that are updated together, their gradients and the optimiser's moments.

    Stepping in the backward pass, at most one gradient is there at a time.
    """
    unique = list({id(p): p for p in parameters}.values())
    sizes = [p.numel() * p.element_size() for p in unique]
    gradients = max(sizes, default=0) if options.in_backward else sum(sizes)
    return sum(sizes) + gradients + moment_bytes(unique, options)


def moment_bytes(parameters: Iterable[nn.Parameter], options: OptimizerOptions) -> int:
    return sum(state_size(p.numel(), options.name, p.element_size()) for p in parameters)


def parts(slot: str, value: Any) -> dict[str, Any]:
    """An entry of an optimiser's state as plain tensors and numbers."""
    if all(hasattr(value, name) for name in CODES):
        return {f"{slot}.{name}": getattr(value, name) for name in CODES}
    return {slot: value}


def joined(found: Mapping[str, Any], parameter: nn.Parameter, optimizer: Optimizer) -> dict[str, Any]:
    """A parameter's state from its parts, each where the optimiser would have made it."""
    state: dict[str, Any] = {}
    for place, value in found.items():
        slot, _, name = place.partition(".")
        # torchao counts steps beside the device, torch's own optimisers on it.
        stays = slot == "step" and not fused(optimizer)
        moved = value.to(parameter.device) if isinstance(value, Tensor) and not stays else value
        if name:
            state.setdefault(slot, {})[name] = moved
        else:
            state[slot] = moved
    return {slot: quantised(value, parameter) if isinstance(value, dict) else value for slot, value in state.items()}


def fused(optimizer: Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def quantised(codes: Mapping[str, Tensor], parameter: nn.Parameter) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    signed = bool(codes["qmap"].min() < 0)
    made: Tensor = OptimState8bit(*(codes[name] for name in CODES), signed, parameter.dtype)
    return made


# -- in the backward pass ---------------------------------------------------------------------------------------


def step_in_backward(parameter: nn.Parameter, optimizer: Optimizer) -> None:
    """Updates one parameter as soon as its gradient is whole, and frees the gradient."""
    with only(parameter, optimizer):
        optimizer.step()
    parameter.grad = None


@contextmanager
def only(parameter: nn.Parameter, optimizer: Optimizer) -> Iterator[None]:
    """Meanwhile the optimiser has this one parameter."""
    groups = optimizer.param_groups
    group = next(group for group in groups if any(p is parameter for p in group["params"]))
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        yield
    finally:
        optimizer.param_groups = groups
