"""Example inputs for networks that bring none: guessed from the first module that reads the input, and tried."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.errors import DBConvertError

BATCH, TOKENS = 2, 16
IMAGE_SIZES = (32, 28, 64, 224, 8, 16, 96, 128, 256)
VECTORS = (nn.Linear, nn.LayerNorm)


def guess_inputs(model: nn.Module) -> dict[str, Any]:
    """One argument that the network's forward accepts.

    Raises:
        DBConvertError: none of the usual shapes works; the message asks for example_inputs().
    """
    name = first_argument(model)
    error: Exception | None = None
    for candidate in candidates(model):
        try:
            run_quietly(model, {name: candidate})
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError, AttributeError) as failure:
            error = error or failure  # the first guess is the likeliest
            continue
        return {name: candidate}
    raise DBConvertError(
        "no example input was given, and none of the usual ones runs",
        where=type(model).__name__,
        why=str(error).split("\n", 1)[0] if error else "",
        hint="add example_inputs() to the file: return what forward takes, batch first",
    )


def run_quietly(model: nn.Module, inputs: dict[str, Any]) -> None:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        model.train(training)


def first_argument(model: nn.Module) -> str:
    parameters = list(inspect.signature(model.forward).parameters.values())
    if not parameters or parameters[0].kind in (
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    ):
        raise DBConvertError(
            "forward does not name its input",
            where=type(model).__name__,
            hint="add example_inputs() that returns a dict",
        )
    return parameters[0].name


def candidates(model: nn.Module) -> Iterator[Tensor]:
    """Images, tokens or vectors, by the kind of the modules that may read them, and in the precision of their weights;
    sizes that attributes name first."""
    for candidate, reader in guesses(model):
        weight = next(reader.parameters(), None)
        yield candidate.to(weight.dtype) if weight is not None and candidate.is_floating_point() else candidate


def guesses(model: nn.Module) -> Iterator[tuple[Tensor, nn.Module]]:
    """What may enter, and the module that would read it."""
    generator = torch.Generator().manual_seed(0)
    named = [getattr(model, name, None) for name in ("image_size", "img_size", "input_size")]
    sizes = [size for size in named if isinstance(size, int)] + list(IMAGE_SIZES)
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            axes = len(module.kernel_size)
            for size in dict.fromkeys(sizes):
                yield torch.randn(BATCH, module.in_channels, *[size] * axes, generator=generator), module
        elif isinstance(module, nn.RNNBase):
            yield torch.randn(BATCH, TOKENS, module.input_size, generator=generator), module
        elif isinstance(module, nn.Embedding):
            for length in (TOKENS, 8, 4):
                yield torch.randint(0, module.num_embeddings, (BATCH, length), generator=generator), module
        elif isinstance(module, VECTORS):
            width = module.in_features if isinstance(module, nn.Linear) else module.normalized_shape[-1]
            yield torch.randn(BATCH, TOKENS, width, generator=generator), module
            yield torch.randn(BATCH, width, generator=generator), module
