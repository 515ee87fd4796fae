"""Trained weights as people have them: safetensors or state_dicts, one file or shards. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dbconvert.checkpoint import INDEX_SUFFIX, locate_checkpoint, read_index, refuse_absent
from dbconvert.errors import DBConvertError
from dbconvert.files import inside
from dbconvert.stream import Item
from dbconvert.tensorfile import DTYPES, Stored, same_bytes

NAMES = (
    "model.safetensors",
    "model.safetensors" + INDEX_SUFFIX,
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX_SUFFIX,
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors" + INDEX_SUFFIX,
)
"""Files that hold a network's weights, the one to read first."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
OTHERS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "tokenizer", "spiece")
"""Beginnings of file names that have such a suffix and hold no weights."""
DANGEROUS = "more than tensors, which is never unpickled"


@dataclass(frozen=True)
class Trained:
    """Trained weights by key: tensors that lie in safetensors files, or that torch.load mapped into memory."""

    location: str
    items: Mapping[str, Item]

    def outlines(self) -> dict[str, Tensor]:
        """Tensors of the same shapes and dtypes without memory."""
        return {
            key: item.outline() if isinstance(item, Stored) else torch.empty_like(item, device="meta")
            for key, item in self.items.items()
        }


def find_weights(folder: Path) -> Path | None:
    """The file of a folder that holds its weights, None where there are none at all.

    Raises:
        DBConvertError: there are weights, but under no name that is read, or behind a link that leads elsewhere.
    """
    for name in NAMES:
        if (folder / name).is_symlink() or (folder / name).exists():
            return inside(folder, name)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith(OTHERS))
    if others:
        raise DBConvertError(
            f"{folder} holds weights under names that are not read: {', '.join(others[:4])}",
            why=f"read are {', '.join(NAMES)}",
            hint="name the file with --weights, or rename it",
        )
    return None


def open_weights(path: Path) -> Trained:
    """Locates or maps the tensors of a weights file: safetensors, a state_dict, or an index of either.

    Raises:
        DBConvertError: it is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise DBConvertError(f"{path} does not exist")
    if path.name.endswith(".safetensors" + INDEX_SUFFIX) or path.suffix == ".safetensors":
        return Trained(str(path), locate_checkpoint(path)[0])
    if not path.name.endswith(INDEX_SUFFIX):
        return Trained(str(path), load_state_dict(path))
    weight_map, _ = read_index(path)
    items: dict[str, Item] = {}
    for file in dict.fromkeys(weight_map.values()):
        items.update(load_state_dict(file))
    refuse_absent(path, weight_map, items)
    return Trained(str(path), items)


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """A state_dict read with `weights_only`, mapped into memory where its format allows."""
    if not path.is_file():
        raise DBConvertError(f"{path} does not exist")
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DBConvertError(
            f"cannot read {path} as a state_dict",
            why=f"it is damaged, or holds {DANGEROUS} ({type(error).__name__})",
            hint="save the weights with safetensors, or torch.save(model.state_dict(), ...)",
        ) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DBConvertError(f"{path} is not a state_dict of tensors", hint="save model.state_dict()")
    for key, value in state.items():
        if value.dtype not in DTYPES.values() or value.layout is not torch.strided or value.is_quantized:
            kind = f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise DBConvertError(
                f"{key} in {path} is no plain tensor ({kind})", hint="save the weights in 32 or 16 bit"
            )
    return state


def equal(first: Item, second: Item) -> bool:
    """Whether two tensors are one and the same to the bit, wherever they are."""
    if isinstance(first, Stored) and isinstance(second, Stored):
        return same_bytes(first, second)
    if isinstance(first, Stored) or isinstance(second, Stored):
        return False
    return first.dtype == second.dtype and torch.equal(first, second)
