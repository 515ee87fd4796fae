"""Latents of pictures on disk: encoded once for every VAE, size and data, in shards that are each whole.

A folder of latents belongs to one VAE and one size of pictures, which latents.json in it says. Each part of the data
has a folder of its own in it, named by its content; mirrored pictures have latents of their own. A shard holds mean
and standard deviation of the posterior, [n, C, H, W] in 16 bits, and the labels.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbconvert.checkpoint import save_tensors
from dbconvert.data.batches import load_batches
from dbconvert.data.content import content_digest
from dbconvert.data.examples import LABEL, Batch, Examples
from dbconvert.data.token_cache import cache_folder, locked
from dbconvert.data_options import DataOptions, LatentOptions
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Advance, Note, Reporter, Stage, silent
from dbconvert.files import write_text
from dbconvert.schema import Positive, identity, parse, read_json, record, to_json
from dbconvert.sources.vae import Vae, open_vae
from dbconvert.tensorfile import Stored, read_header

SHARD = 1024
"""Pictures a shard: what a killed run may have to encode again."""
MEAN, STD, LABELS = "mean", "std", "label"
DESCRIPTION = "latents.json"
KEPT = torch.float16


@record
class Description:
    """What a folder of latents holds: latents.json.

    Args:
        vae: digest of its weights.
        channels, height, width: of the pictures that were encoded.
        crop: whether they are the squares in the middle.
    """

    vae: str
    channels: Positive
    height: Positive
    width: Positive
    crop: bool
    shard: Positive = SHARD


class Latents:
    """Examples whose pictures are latents of a VAE.

    Args:
        pictures: what was encoded.
        argument: of the network, that takes them.
        folders: of their shards, and of those of the mirrored pictures where these are used too.
        draw: give posteriors, [N, V, 2, C, H, W], of which `drawn` makes latents; otherwise their means, [N, C, H, W].
        scale, shift: latents are (z - shift) scale.
    """

    def __init__(
        self, pictures: Examples, argument: str, folders: list[Path], *, draw: bool, scale: float, shift: float
    ) -> None:
        self.pictures, self.argument, self.folders = pictures, argument, folders
        self.draw, self.scale, self.shift = draw, scale, shift

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, indices: list[int]) -> Batch:
        views = self.folders if self.draw else self.folders[:1]
        means = torch.stack([self.gathered(folder, MEAN, indices) for folder in views], 1)
        values = (means.float() - self.shift) * self.scale
        if self.draw:
            stds = torch.stack([self.gathered(folder, STD, indices) for folder in views], 1)
            values = torch.stack([values, stds.float() * self.scale], 2)
        else:
            values = values[:, 0]
        return {self.argument: values, LABEL: self.gathered(self.folders[0], LABELS, indices)}

    def gathered(self, folder: Path, name: str, indices: list[int]) -> Tensor:
        return torch.stack([self.row(folder, name, index) for index in indices])

    def row(self, folder: Path, name: str, index: int) -> Tensor:
        place = self.maps.setdefault((folder, index // SHARD), {})
        if not place:
            place.update(
                {key: mapped(stored) for key, stored in read_header(shard_file(folder, index // SHARD))[0].items()}
            )
        return torch.from_numpy(np.array(place[name][index % SHARD]))

    @cached_property
    def maps(self) -> dict[tuple[Path, int], dict[str, Any]]:
        """The shards that were read, mapped into memory by whoever reads them."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "maps"}

    def label_counts(self) -> Tensor:
        counts = torch.zeros(self.pictures.classes, dtype=torch.float64)
        for shard in range(shards_of(len(self))):
            stored = read_header(shard_file(self.folders[0], shard))[0][LABELS]
            labels = torch.from_numpy(np.array(mapped(stored)))
            counts += labels.bincount(minlength=self.pictures.classes)
        return counts


def mapped(stored: Stored) -> Any:
    dtype = {torch.float16: np.float16, torch.int64: np.int64}[stored.dtype]
    return np.memmap(stored.path, dtype, "r", stored.start, stored.shape)


# -- opening and encoding ---------------------------------------------------------------------------------------


def open_latents(
    pictures: Examples, argument: str, data: DataOptions, *, training: bool, report: Reporter = silent
) -> Latents:
    """The latents of one part of the data, from disk, or encoded now as far as they are not there.

    Args:
        training: with mirrored pictures, where the options ask for them, and to be drawn.

    Raises:
        UsageError: the options contradict each other, the VAE does not take the pictures, or the folder holds latents
            of another VAE or of pictures of another size.
        DBConvertError: the VAE or the pictures cannot be read, or the disk is full.
    """
    options = data.latents
    assert options is not None
    refuse(data)
    vae = open_vae(options.vae, options.revision)
    shape = pictures_shape(pictures)
    vae.refuse(shape)
    crop = data.image is not None and data.image.crop
    root = described_folder(Description(vae.digest, *shape, crop), data, options)
    content = content_digest(pictures)[:16]
    folders = [root / content, *([root / f"{content}-mirrored"] if training and data.flip else [])]
    announce(folders, len(pictures), vae, shape, report)
    for folder in folders:
        if missing_shards(folder, len(pictures)):
            with locked(folder / "encoding"):
                encode_missing(folder, pictures, vae, data, mirrored=folder is not folders[0], report=report)
    scale = vae.scale if options.scale is None else options.scale
    return Latents(pictures, argument, folders, draw=training, scale=scale, shift=vae.shift)


def refuse(data: DataOptions) -> None:
    image = data.image
    if image is not None and (set(image.mean) != {0.0} or set(image.std) != {1.0}):
        raise UsageError(
            "data.image.mean and data.image.std do not apply to latents",
            hint="leave them out: the VAE takes pictures in its own range; data.latents.scale is that of latents",
        )
    if data.randaugment is not None:
        raise UsageError("data.randaugment does not apply to latents", hint="they are encoded once; leave it out")


def pictures_shape(pictures: Examples) -> tuple[int, int, int]:
    """C, H, W of the first one."""
    _, channels, height, width = next(value for value in pictures.__getitems__([0]).values() if value.dim() == 4).shape
    return channels, height, width


def described_folder(wanted: Description, data: DataOptions, options: LatentOptions) -> Path:
    """The folder of latents of this description, made where it is missing.

    Raises:
        UsageError: the one that was named holds other latents, or something else.
    """
    if options.cache is None:
        root = cache_folder(data) / "latents" / identity(wanted)[:32]
    else:
        root = Path(options.cache).expanduser()
    file = root / DESCRIPTION
    if not file.is_file():
        if root.is_dir() and any(root.iterdir()):
            raise UsageError(
                f"{root} holds no latents, and is not empty", hint="name a new folder with data.latents.cache"
            )
        write_text(file, to_json(wanted))
        return root
    found = parse(Description, read_json(file), file=str(file))
    if found != wanted:
        raise UsageError(
            f"{root} holds latents of {difference(found, wanted)}",
            why="nothing in it was changed",
            hint="name another folder with data.latents.cache, or the VAE and the size that it was made with",
        )
    return root


def difference(found: Description, wanted: Description) -> str:
    if found.vae != wanted.vae:
        return "another VAE"
    if found.crop != wanted.crop:
        return "pictures that were cropped" if found.crop else "pictures that were not cropped"
    if found.shard != wanted.shard:
        return "another version of dbconvert"
    return (
        f"pictures of {found.channels} x {found.height} x {found.width}, not "
        f"{wanted.channels} x {wanted.height} x {wanted.width}"
    )


def announce(folders: list[Path], count: int, vae: Vae, shape: tuple[int, ...], report: Reporter) -> None:
    """Says what will be written before anything is."""
    numbers = vae.channels * (shape[1] // vae.factor) * (shape[2] // vae.factor)
    each = 2 * numbers * KEPT.itemsize + torch.int64.itemsize
    missing = sum(len(missing_shards(folder, count)) for folder in folders)
    if missing:
        size = each * min(count * len(folders), missing * SHARD)
        views = " and of their mirror images" if len(folders) > 1 else ""
        report(Note(f"latents of {count:,} pictures{views}: {size / 1e6:,.1f} MB to be written to {folders[0].parent}"))


def shards_of(count: int) -> int:
    return -(-count // SHARD)


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


def missing_shards(folder: Path, count: int) -> list[int]:
    """Those that are not there or not whole."""
    return [shard for shard in range(shards_of(count)) if not is_whole(shard_file(folder, shard))]


def is_whole(file: Path) -> bool:
    try:
        return set(read_header(file)[0]) == {MEAN, STD, LABELS}
    except DBConvertError:
        return False


def encode_missing(
    folder: Path, pictures: Examples, vae: Vae, data: DataOptions, *, mirrored: bool, report: Reporter = silent
) -> None:
    """Encodes the shards that are missing, one after the other; each is written whole or not at all.

    Raises:
        DBConvertError: pictures have several sizes or cannot be encoded, or the disk is full.
    """
    assert data.latents is not None
    missing, at_once = missing_shards(folder, len(pictures)), data.latents.batch
    if not missing:
        return
    report(Stage("encoding mirrored pictures" if mirrored else "encoding pictures", len(missing)))
    shards = [range(shard * SHARD, min(len(pictures), (shard + 1) * SHARD)) for shard in missing]
    batches = [[list(indices[at : at + at_once]) for at in range(0, len(indices), at_once)] for indices in shards]
    loaded = iter(load_batches(pictures, [batch for each in batches for batch in each], data.workers))
    for shard, each in zip(missing, batches, strict=True):
        parts = [encoded(next(loaded), indices, vae, mirrored=mirrored) for indices in each]
        save_tensors(shard_file(folder, shard), {key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        report(Advance(1))


def encoded(batch: Batch, indices: list[int], vae: Vae, *, mirrored: bool) -> dict[str, Tensor]:
    """Raises DBConvertError for pictures that are not in [0, 1], or latents that 16 bits do not hold."""
    (given,) = (value for name, value in batch.items() if name != LABEL)
    if given.min() < 0 or given.max() > 1:
        raise DBConvertError(
            f"pictures {indices[0]} to {indices[-1]} are not in [0, 1]", hint="a VAE takes bytes, or numbers in [0, 1]"
        )
    mean, std = vae.encode(given.flip(-1) if mirrored else given)
    kept = {MEAN: mean.to(KEPT), STD: std.to(KEPT), LABELS: batch[LABEL]}
    if not all(kept[key].isfinite().all() for key in (MEAN, STD)):
        raise DBConvertError(f"the latents of pictures {indices[0]} to {indices[-1]} are not finite in 16 bits")
    return kept
