"""The folder that split writes: everything needed to train, except the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dbconvert.checkpoint import load_tensors
from dbconvert.engine.trained import settled
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.files import matches, write_text
from dbconvert.graph.inject import PREFIX
from dbconvert.plan import NoiseFit, Plan, read_plan
from dbconvert.schema import parse, read_json, to_json
from dbconvert.sources.base import Source
from dbconvert.sources.resolve import reopen_source

PLAN, NOISE, RECIPE, README, TRAIN, PICTURE = (
    "plan.json", "noise.json", "recipe.yaml", "README.md", "train.py", "noise.png",
)  # fmt: skip
MODEL, WEIGHTS = "model", "weights"
PERIPHERY = "periphery.safetensors"
PLAN_KEY, NOISE_KEY = "dbconvert.plan", "dbconvert.noise"
"""Metadata keys of our safetensors files: the split's identity in parts, the whole plan in checkpoints."""


def block_file(block: int) -> str:
    return f"block-{block}.safetensors"


@dataclass(frozen=True)
class Package:
    """A package on disk; weights are read when asked for."""

    folder: Path
    plan: Plan
    noise: NoiseFit | None

    def source(self) -> Source:
        return reopen_source(self.plan.source, [self.folder / MODEL])

    def tensors(self, *, block: int | None = None) -> dict[str, Tensor]:
        """The network's weights: of all blocks, or of one; the periphery's always. Stored ones keep their dtype.

        Raises:
            DBConvertError: a file is missing or is not the one that was written.
        """
        blocks = range(len(self.plan.blocks)) if block is None else [block]
        tensors: dict[str, Tensor] = {}
        for name in [*map(block_file, blocks), PERIPHERY]:
            path = self.folder / WEIGHTS / name
            self.check(name)
            tensors.update(load_tensors(path))
        if self.plan.keys == "network":
            return tensors
        added = {key: tensor for key, tensor in tensors.items() if key.startswith(PREFIX + ".")}
        stored = {key: tensor for key, tensor in tensors.items() if key not in added}
        return {**settled(self.source().to_network(stored), self.plan.anatomy.tied), **added}

    def check(self, name: str) -> None:
        """Refuses a weights file that is not the one that was written."""
        path = self.folder / WEIGHTS / name
        if path.is_file() and not matches(path, self.plan.files[name]):
            raise DBConvertError(
                f"{path} is not the file that the plan names: its content differs",
                hint="copy the package again; it may be truncated, or from another split",
            )

    def keep_noise(self, noise: NoiseFit) -> None:
        """Writes the fit into the package, so that the jobs of other blocks use the same."""
        if not (self.folder / NOISE).exists():
            write_text(self.folder / NOISE, to_json(noise))


def open_package(folder: Path) -> Package:
    """Reads a package.

    Raises:
        UsageError: the folder is not one.
        DBConvertError: it is broken, or was written by a newer version.
    """
    if not (folder / PLAN).is_file():
        raise UsageError(f"{folder} is not a package: it has no {PLAN}", hint="make one with dbconvert split")
    return Package(folder, read_plan(folder / PLAN), read_noise(folder / NOISE))


def read_noise(path: Path) -> NoiseFit | None:
    """A noise fit, None where there is no such file."""
    return parse(NoiseFit, read_json(path), file=str(path)) if path.is_file() else None
