"""A diffusers network: a folder with its config.json, or that of a whole pipeline, or a configuration out of a plan."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from dbconvert.diffusion.predictions import Betas, Predicted, Prediction, Times
from dbconvert.errors import DBConvertError
from dbconvert.plan import SourceRef
from dbconvert.schema import identity
from dbconvert.sources.base import PlainKeys, Source
from dbconvert.sources.transformers_config import first_line, read_settings
from dbconvert.sources.transformers_files import CONFIG, companions, copy_files
from dbconvert.sources.twin import shrunken
from dbconvert.weights import Trained, find_weights, open_weights

PIPELINE, PARTS = "model_index.json", ("transformer", "unet")
SCHEDULER = Path("scheduler") / "scheduler_config.json"
CLASS, VERSION = "_class_name", "_diffusers_version"
BATCH, TOKENS, SIDE = 2, 6, 4
PREDICTIONS: dict[str, Predicted] = {"epsilon": "epsilon", "v_prediction": "v", "flow_prediction": "flow"}
BETAS: dict[str, Betas] = {"squaredcos_cap_v2": "cosine", "linear": "linear", "scaled_linear": "scaled_linear"}
OTHER_BETAS = ("trained_betas", "rescale_betas_zero_snr")
WIDTHS = ("caption_channels", "joint_attention_dim", "cross_attention_dim")
"""Entries of a configuration that tell the width of the text that a network is given, the first that is there."""


def is_diffusers(folder: Path) -> bool:
    """Whether a folder holds a pipeline, or a configuration as diffusers writes it."""
    if (folder / PIPELINE).is_file():
        return True
    return (folder / CONFIG).is_file() and CLASS in read_settings(folder / CONFIG, str(folder))


class DiffusersSource(PlainKeys):
    """A denoiser of diffusers, with its trained weights where there are any.

    Args:
        location: as the user gave it; None when the configuration came out of a plan.
        folder: where its own files lie; None likewise.
        config: its configuration, plain.
    """

    def __init__(self, location: str | None, folder: Path | None, config: dict[str, Any]) -> None:
        self.location, self.folder, self.config = location, folder, config
        self.name = str(config.get(CLASS))

    @classmethod
    def open(cls, path: Path) -> DiffusersSource:
        """From a folder: a network's own, or a pipeline's, whose denoiser is taken.

        Raises:
            DBConvertError: there is no configuration of a network.
        """
        folder = path
        if (path / PIPELINE).is_file():
            parts = [path / part for part in PARTS if (path / part / CONFIG).is_file()]
            if not parts:
                raise DBConvertError(f"the pipeline {path} has no {' or '.join(PARTS)} with a {CONFIG}")
            folder = parts[0]
        return cls(str(path), folder, read_settings(folder / CONFIG, str(path)))

    @classmethod
    def from_plan(cls, ref: SourceRef) -> DiffusersSource:
        return cls(None, None, ref.config or {})

    @cached_property
    def ref(self) -> SourceRef:
        content = {key: value for key, value in self.config.items() if key != VERSION}
        return SourceRef("diffusers", self.name, self.location or "", (CONFIG,), identity(content), content)

    def build(self) -> nn.Module:
        try:
            import diffusers
        except ImportError:
            raise DBConvertError(f"{self.name} needs diffusers", hint="pip install 'dbconvert[diffusion]'") from None
        made = getattr(diffusers, self.name, None)
        if made is None:
            raise DBConvertError(f"diffusers has no {self.name}", where=self.location or "", hint="correct config.json")
        try:
            model: nn.Module = made.from_config(self.config)
        except Exception as error:
            raise DBConvertError(
                f"diffusers cannot build {self.name} from this configuration",
                where=self.location or "",
                why=f"{type(error).__name__}: {first_line(error)}",
                hint="correct config.json, or write a model.py around it",
            ) from error
        return model.float()

    def twins(self) -> Iterator[Source]:
        return (DiffusersSource(None, None, content) for content in shrunken(self.config))

    def longest(self) -> int | None:
        return None

    def example_inputs(self, model: nn.Module) -> dict[str, Any]:
        """Images, times, classes and text of the sizes that the configuration names, as far as forward takes them.

        Raises:
            DBConvertError: it takes something else.
        """
        generator = torch.Generator().manual_seed(0)
        size = self.config.get("sample_size") or 32
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (BATCH, self.config.get("in_channels") or 4, height, width)
        width_of_text = next((self.config[name] for name in WIDTHS if self.config.get(name)), None)
        taken = inspect.signature(model.forward).parameters
        known = {
            "hidden_states": torch.randn(shape, generator=generator),
            "sample": torch.randn(shape, generator=generator),
            "timestep": torch.arange(10, 10 + BATCH),
            "class_labels": torch.arange(BATCH) % (self.config.get("num_embeds_ada_norm") or 1),
        }
        if width_of_text is not None:
            known["encoder_hidden_states"] = torch.randn(BATCH, TOKENS, width_of_text, generator=generator)
        if self.config.get("pooled_projection_dim"):
            pooled = (BATCH, self.config["pooled_projection_dim"])
            known["pooled_projections"] = torch.randn(pooled, generator=generator)
        if "img_ids" in taken:
            known |= places(len(self.config.get("axes_dims_rope") or (0, 0, 0)))
            known["hidden_states"] = torch.randn(BATCH, SIDE * SIDE, shape[1], generator=generator)
        if self.config.get("guidance_embeds"):
            known["guidance"] = torch.ones(BATCH)
        found = {name: value for name, value in known.items() if name in taken}
        missing = [name for name, one in taken.items() if one.default is inspect.Parameter.empty and name not in found]
        if missing:
            raise DBConvertError(
                f"no example input is known for {missing[0]}",
                where=self.name,
                hint="write a model.py with build_model() and example_inputs() around it",
            )
        return found

    def copy_to(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.folder is not None:
            copy_files([CONFIG, *companions(self.folder)], self.folder, folder)
        else:
            (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")

    def trained(self, *, fetch: bool) -> Trained | None:
        found = None if self.folder is None else find_weights(self.folder)
        return None if found is None else open_weights(found)

    def prediction(self) -> Prediction | None:
        """As its pipeline's scheduler says; None where there is none.

        Raises:
            DBConvertError: it was trained in a way that has no change of variables here.
        """
        if self.folder is None:
            return None
        places = (self.folder / SCHEDULER, self.folder.parent / SCHEDULER)
        path = next((place for place in places if place.is_file()), None)
        return None if path is None else told_by(read_settings(path, str(path)), str(path))


def places(axes: int) -> dict[str, torch.Tensor]:
    """Where the tokens of a picture and of a text lie, as networks of sequences are told: [tokens, axes], rows and
    columns last."""
    rows = torch.arange(SIDE * SIDE)
    of_picture = torch.zeros(SIDE * SIDE, axes)
    of_picture[:, -2:] = torch.stack([rows // SIDE, rows % SIDE], 1).float()
    return {"img_ids": of_picture, "txt_ids": torch.zeros(TOKENS, axes)}


def told_by(scheduler: dict[str, Any], where: str) -> Prediction:
    """What a scheduler's configuration says of the network's training."""
    if "sigma_data" in scheduler:
        return Prediction("edm")
    steps = scheduler.get("num_train_timesteps", 1000)
    if "beta_schedule" not in scheduler:
        return Prediction("flow", Times(steps=steps, scale=float(steps)))
    kind, betas = PREDICTIONS.get(scheduler.get("prediction_type", "epsilon")), BETAS.get(scheduler["beta_schedule"])
    others = [name for name in OTHER_BETAS if scheduler.get(name)]
    if kind is None or betas is None or others:
        said = others[0] if others else f"{scheduler.get('prediction_type')}, {scheduler['beta_schedule']}"
        raise DBConvertError(
            f"no change of variables is known for this training ({said})",
            where=where,
            hint=f"name the nearest: split.prediction ({', '.join(get_args(Predicted))}) and split.times",
        )
    return Prediction(kind, Times(betas, steps, scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)))
