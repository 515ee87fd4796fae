"""A network written in a Python file: `model.py` or `model.py:name`."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from dbconvert.anatomy import Adapter
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.graph.fake import build_up_to, empty_weights
from dbconvert.plan import SourceRef
from dbconvert.sources.base import PlainKeys, Source
from dbconvert.sources.examples import guess_inputs, run_quietly
from dbconvert.sources.python_files import (
    explained,
    imported_neighbours,
    load_file,
    neighbours_importable,
    real,
    sha256_files,
)
from dbconvert.weights import Trained

DEFAULT_NAME = "build_model"


class ModelFile(PlainKeys):
    """A module, a class or a function without required arguments, in a Python file.

    An `example_inputs()` beside it is used when present: a tensor, a tuple in the order of forward's arguments,
    or a dict by name, batch first. An `adapter()` beside it says what the layers are, where the graph does not show it.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.module = load_file(path)
        self.entry_name, self.entry = find_entry(self.module, name, path)
        self.built = False

    @cached_property
    def ref(self) -> SourceRef:
        if not self.built:
            self.build()  # imports may hide inside functions: the neighbours are complete only afterwards
        files = tuple(str(file) for file in imported_neighbours(self.path))
        return SourceRef(
            kind="model_file",
            name=self.entry_name,
            location=str(self.path),
            files=files,
            sha256=sha256_files(self.path.parent, files),
        )

    def build(self) -> nn.Module:
        self.built = True
        if isinstance(self.entry, nn.Module):
            return copy.deepcopy(self.entry)
        with neighbours_importable(real(self.path).parent), explained(self.path):
            model = self.entry()
        if not isinstance(model, nn.Module):
            raise DBConvertError(
                f"{self.entry_name}() in {self.path.name} returned a {type(model).__name__}, not an nn.Module"
            )
        return model

    def build_within(self, limit: int) -> nn.Module:
        model = build_up_to(self.build, limit)
        if model is not None:
            return model
        try:
            with empty_weights():
                return self.build()
        except DBConvertError:
            return self.build()  # its code wants the numbers of its parameters

    def twins(self) -> Iterator[Source]:
        return iter(())

    def longest(self) -> int | None:
        return None

    def example_inputs(self, model: nn.Module) -> dict[str, Any]:
        function = getattr(self.module, "example_inputs", None)
        if function is None:
            return guess_inputs(model)
        with neighbours_importable(real(self.path).parent), explained(self.path):
            given = function()
        inputs = self.named(given, model)
        with neighbours_importable(real(self.path).parent), explained(self.path):
            run_quietly(model, inputs)
        return inputs

    def named(self, given: Any, model: nn.Module) -> dict[str, Any]:
        if isinstance(given, dict):
            return given
        values = given if isinstance(given, (tuple, list)) else (given,)
        if not any(isinstance(value, Tensor) for value in values):
            raise DBConvertError(f"example_inputs() in {self.path.name} returned no tensor")
        return by_argument_name(model, tuple(values), self.path)

    def adapter(self) -> Adapter | None:
        function = getattr(self.module, "adapter", None)
        if function is None:
            return None
        with neighbours_importable(self.path.resolve().parent), explained(self.path):
            given = function()
        if not isinstance(given, Adapter):
            raise DBConvertError(
                f"adapter() in {self.path.name} returned a {type(given).__name__}, not a dbconvert.Adapter",
                hint='return dbconvert.Adapter(layers=("blocks",), enters=(0,), leaves=())',
            )
        return given

    def copy_to(self, folder: Path) -> None:
        for name in self.ref.files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path.parent / name, target)

    def trained(self, *, fetch: bool) -> Trained | None:
        return None


def by_argument_name(model: nn.Module, values: tuple[Any, ...], path: Path) -> dict[str, Any]:
    """Positional example inputs under the names that the network's forward gives them."""
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in positional]
    if len(values) > len(names):
        raise DBConvertError(
            f"example_inputs() in {path.name} returns {len(values)} values, and forward names {len(names)} arguments",
            hint="return one value for each argument that forward names, or a dict by name",
        )
    return dict(zip(names, values, strict=False))


def find_entry(module: ModuleType, name: str | None, path: Path) -> tuple[str, Any]:
    """What builds the network, and its name: the one given, else `build_model`.

    Raises:
        UsageError: the file has no such name, or it is nothing to build from.
    """
    if name is not None:
        if not hasattr(module, name):
            raise UsageError(
                f"{path.name} has no {name}", hint=f"it defines: {', '.join(candidates(module)) or 'none'}"
            )
        return name, usable(getattr(module, name), name, path)
    if hasattr(module, DEFAULT_NAME):
        return DEFAULT_NAME, usable(getattr(module, DEFAULT_NAME), DEFAULT_NAME, path)
    found = ", ".join(candidates(module)) or "none"
    raise UsageError(
        f"{path.name} has no {DEFAULT_NAME}()",
        hint=f"name what to build, {path.name}:NAME; it defines: {found}",
    )


def candidates(module: ModuleType) -> list[str]:
    """Names of the modules and module classes that a file defines."""
    names = []
    for name, value in vars(module).items():
        own_class = isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
        if own_class or isinstance(value, nn.Module):
            names.append(name)
    return names


def usable(entry: Any, name: str, path: Path) -> Any:
    if isinstance(entry, nn.Module):
        return entry
    if not callable(entry):
        raise UsageError(f"{name} in {path.name} is neither an nn.Module nor something to call")
    required = [
        p.name
        for p in inspect.signature(entry).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required:
        raise UsageError(
            f"{name} in {path.name} needs arguments: {', '.join(required)}",
            hint=f"add a function without arguments, def {DEFAULT_NAME}(): return {name}(...)",
        )
    return entry
