"""What recipes may say of data: where examples come from, and how pictures, latents and puzzles are made."""

from __future__ import annotations

from typing import Literal

from dbconvert.schema import Count, Positive, PositiveFloat, record

Mode = Literal["RGB", "L"]
"""Colour or grey."""


@record
class PuzzleOptions:
    """Of the built-in puzzles, whose examples are made when they are asked for.

    Args:
        size: elements of `s3` (12), points of `permutation-powers` (16), cells of `automaton` (24).
        steps: the highest power of `permutation-powers` (8); steps of `automaton` (4), or the lowest and the highest
            number of them, of which each example is told its own.
        single: only the answer that takes all steps has a label: that of the last position, of the highest power, of
            one cell.
        examples: of the training part, which an epoch goes through (200,000).
    """

    size: Positive | None = None
    steps: Positive | tuple[Positive, Positive] | None = None
    single: bool = False
    examples: Positive | None = None


@record
class ImageOptions:
    """How pictures become tensors: cut out if `crop`, resized to `size`, scaled to [0, 1], augmented, then
    (x - mean) / std.

    Args:
        mode: what picture files are read as; None reads grey ones with one channel and all others with three.
        crop: only the largest square in the middle of a picture.
    """

    size: Positive | None = None
    mode: Mode | None = None
    crop: bool = False
    mean: tuple[float, ...] = (0.0,)
    std: tuple[PositiveFloat, ...] = (1.0,)


@record
class RandAugment:
    """RandAugment (Cubuk et al. 2020): `operations` random ones a picture, of magnitude 0 to 30."""

    operations: Positive = 2
    magnitude: Count = 9


@record
class LatentOptions:
    """Pictures as the latents of a VAE: encoded once, kept on disk, and drawn anew from their posterior every epoch.

    Args:
        vae: of diffusers, an AutoencoderKL: a folder or a hub id, of which `revision` may name one.
        scale: latents are multiplied by it; by default the VAE's own scaling_factor.
        cache: the folder to keep latents in, of one VAE and one size of pictures; by default one for each in the cache
            of `data.cache`.
        batch: pictures that are encoded, or decoded, together.
    """

    vae: str
    revision: str | None = None
    scale: PositiveFloat | None = None
    cache: str | None = None
    batch: Positive = 16


@record
class DataOptions:
    """Where examples come from.

    Args:
        source: a built-in name, a hub id, a local folder, a parquet file, or `file.py:function`, which returns a
            map-style dataset of dicts for a part's name. Text also comes from text files (one document each), and from
            tables of documents (JSON, CSV).
        train, validation, test: names of the parts, or of files beside the source. A single file of text or of
            documents is cut by position, 90 / 5 / 5 %; `all` is the whole of it. `train[:1%]` and `train[1%:]` are
            pieces of a part, by documents, or by characters of a text file; without % they count documents.
        input, label: names of the columns; `input: null` takes the network's own argument name, or the only
            column that is not the label.
        puzzle: of the built-in sources `s3`, `permutation-powers` and `automaton` (`dbconvert.data.puzzles`).
        tile: the source is a folder of mosaics of pictures of so many pixels a side (`dbconvert.data.mosaics`).
        flip: mirror half of the training pictures.
        latents: encode pictures by a VAE first. `image.mean` and `image.std` are not used then: the VAE has a range.
        workers: processes that load batches.
        tokenizer: `byte`, `char` (the characters of the training part), or a Transformers folder or hub id.
        text: name of the column that holds the text.
        length: tokens an example.
        pack: documents follow each other, each with an end-of-document token (or a line break, where the tokenizer
            has none), and are cut into examples; what is left over at the end is not used. `false` makes every
            document an example, cut or padded to `length`.
        documents: whether tokens of an example see those of other documents in it (`joined`), or not (`masked`).
        limit: at most so many documents a part, the first ones.
        config, revision: of a hub id, e.g. `refs/convert/parquet` where the repository itself is a script.
        streaming: a hub id is read over the network, and only its tokens are stored. Local files are always read
            where they are.
        cache: folder of tokenised text; by default $DBCONVERT_CACHE, else dbconvert in the user's cache folder.
    """

    source: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    test: str | None = "test"
    input: str | None = None
    label: str = "label"
    image: ImageOptions | None = None
    puzzle: PuzzleOptions | None = None
    tile: Positive | None = None
    flip: bool = False
    randaugment: RandAugment | None = None
    latents: LatentOptions | None = None
    workers: Count = 0
    tokenizer: str | None = None
    text: str = "text"
    length: Positive | None = None
    pack: bool = True
    documents: Literal["joined", "masked"] = "joined"
    limit: Positive | None = None
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    cache: str | None = None
