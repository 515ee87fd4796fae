"""Mosaics: small pictures of one size as the tiles of one picture file, row by row, beside a file of their labels.

`NAME_PART.jpg` (or jpeg, png, webp) holds the tiles of a part, `NAME_PART_labels.u8` their labels, one byte each, in
the order of the tiles: from left to right, then from top to bottom. `PART.jpg` and `PART_labels.u8` serve too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dbconvert.data.images import pixels
from dbconvert.data.parts import sliced
from dbconvert.data.pictures import Pictures
from dbconvert.data_options import Mode
from dbconvert.errors import DBConvertError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LABELS = "_labels.u8"


def open_mosaic(folder: Path, part: str, tile: int, mode: Mode | None) -> Pictures:
    """A part, or a piece of one as in `train[:90%]`.

    Args:
        tile: height and width of every picture.
        mode: as `pixels` takes it.

    Raises:
        UsageError: there is no such part, or more than one.
        DBConvertError: it cannot be read, or its labels are not those of its tiles.
    """
    piece = sliced(part)
    name = part if piece is None else piece.name
    file = file_of(folder, name)
    tiles = cut(read(file, mode), tile, file)
    labels = read_labels(file, len(tiles))
    chosen = range(len(tiles)) if piece is None else piece.of(len(tiles))
    kept = slice(chosen.start, chosen.stop)
    return Pictures(tiles[kept], labels[kept])


def parts_of(folder: Path) -> dict[Path, str]:
    """The mosaics of a folder, those with labels, and their names without ending."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]
    return {file: file.stem for file in files if file.with_name(file.stem + LABELS).is_file()}


def file_of(folder: Path, name: str) -> Path:
    known = parts_of(folder)
    found = [file for file, stem in known.items() if stem == name or stem.endswith(f"_{name}")]
    if len(found) > 1:
        listed = ", ".join(file.name for file in found)
        raise UsageError(f"several mosaics in {folder} are part {name}: {listed}", hint="keep one of them there")
    if not found:
        there = ", ".join(file.name for file in known) or "none"
        raise UsageError(
            f"{folder} has no mosaic of part {name}",
            why=f"mosaics with labels there: {there}",
            hint=f"it is a picture NAME_{name}.jpg or .png, with its labels in NAME_{name}{LABELS}",
        )
    return found[0]


def read(file: Path, mode: Mode | None) -> Tensor:
    """uint8 [C, H, W]."""
    from PIL import Image

    allowed = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # it is as large as it has to be
    try:
        with Image.open(file) as picture:
            return pixels(picture, mode)
    except OSError as error:
        raise DBConvertError(f"cannot read {file}", why=str(error).split("\n", 1)[0]) from None
    finally:
        Image.MAX_IMAGE_PIXELS = allowed


def cut(mosaic: Tensor, tile: int, file: Path) -> Tensor:
    """[C, rows t, columns t] -> [rows columns, C, t, t]."""
    channels, height, width = mosaic.shape
    if height % tile or width % tile:
        raise DBConvertError(
            f"{file.name} is {width} x {height} pixels, which tiles of {tile} x {tile} do not fill",
            hint="set data.tile to the size of one picture",
        )
    grid = mosaic.view(channels, height // tile, tile, width // tile, tile)
    return grid.permute(1, 3, 0, 2, 4).reshape(-1, channels, tile, tile).contiguous()


def read_labels(file: Path, tiles: int) -> Tensor:
    labels = file.with_name(file.stem + LABELS)
    found = np.fromfile(labels, np.uint8)
    if len(found) != tiles:
        raise DBConvertError(
            f"{labels.name} has {len(found)} labels, and {file.name} has {tiles} tiles",
            hint="there is one byte for every tile; data.tile has to be the size of one picture",
        )
    return torch.from_numpy(found).long()
