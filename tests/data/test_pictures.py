"""Pictures from mosaics, folders and tables: what is read, that each is decoded once, and one message a mistake."""

import networks
import numpy as np
import pytest
import torch
from PIL import Image

from dbconvert.data import pictures
from dbconvert.data.datasets import open_part
from dbconvert.data.examples import LABEL, Examples
from dbconvert.data.images import to_image
from dbconvert.data_options import DataOptions, ImageOptions
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.graph.analysis import analyse

TILE, COLUMNS, ROWS = 16, 3, 2


@pytest.fixture(scope="module")
def anatomy():
    return analyse(*networks.build("vit"))


def tiles(channels=3):
    """[N, H, W, C] random bytes."""
    return np.random.default_rng(0).integers(0, 256, (ROWS * COLUMNS, TILE, TILE, channels), dtype=np.uint8)


def save_mosaic(folder, name="toy_train", labels=(0, 1, 2, 3, 4, 0), shown=None):
    folder.mkdir(exist_ok=True)
    shown = tiles() if shown is None else shown
    rows = [np.concatenate(shown[r * COLUMNS : (r + 1) * COLUMNS], 1) for r in range(ROWS)]
    Image.fromarray(np.concatenate(rows).squeeze()).save(folder / f"{name}.png")
    (folder / f"{name}_labels.u8").write_bytes(bytes(labels))


def examples_of(options, anatomy, part="train"):
    return Examples(open_part(options, part), options, anatomy, classes=5)


def test_a_mosaic_is_read_row_by_row(tmp_path, anatomy):
    save_mosaic(tmp_path / "toy")
    save_mosaic(tmp_path / "toy", "toy_test", labels=(1,) * 6)
    options = DataOptions(source=str(tmp_path / "toy"), tile=TILE, input="img", label="fine_label")
    examples = examples_of(options, anatomy)
    assert examples.dataset.images.dtype == torch.uint8 and len(examples) == 6
    batch = examples.__getitems__([4, 1])
    expected = torch.from_numpy(tiles()[[4, 1]]).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(batch["x"], expected) and batch[LABEL].tolist() == [4, 1]
    assert torch.equal(examples[4]["x"], expected[0]) and examples[4][LABEL] == 4
    assert examples.label_counts().tolist() == [2, 1, 1, 1, 1]
    assert examples_of(options, anatomy, "test").label_counts().tolist() == [0, 6, 0, 0, 0]
    assert examples_of(options, anatomy, "train[50%:]").dataset.labels.tolist() == [3, 4, 0]


def test_grey_digits_are_read_as_colour(anatomy):
    options = DataOptions(source="digits", image=ImageOptions(size=16, mode="RGB"))
    (pictures,) = (v for k, v in Examples(open_part(options, "test"), options, anatomy, 10)[0].items() if k != LABEL)
    assert pictures.shape == (3, 16, 16) and torch.equal(pictures[0], pictures[2])


def test_tiles_and_digits_are_resized_too(tmp_path, anatomy):
    save_mosaic(tmp_path / "toy")
    options = DataOptions(source=str(tmp_path / "toy"), tile=TILE, image=ImageOptions(size=8))
    examples = examples_of(options, anatomy)
    assert examples.__getitems__([0, 3])["x"].shape == (2, 3, 8, 8) and examples[1]["x"].shape == (3, 8, 8)
    given = DataOptions(source="digits", image=ImageOptions(size=12))
    digits = Examples(open_part(given, "train"), given, anatomy, classes=10)
    assert digits.__getitems__([0, 3])["x"].shape == (2, 1, 12, 12)


def test_a_grey_mosaic_can_be_read_as_colour(tmp_path):
    save_mosaic(tmp_path / "toy", shown=tiles(1))
    options = DataOptions(source=str(tmp_path / "toy"), tile=TILE)
    assert open_part(options, "train").images.shape == (6, 1, TILE, TILE)
    colour = open_part(DataOptions(source=options.source, tile=TILE, image=ImageOptions(mode="RGB")), "train")
    assert colour.images.shape == (6, 3, TILE, TILE) and torch.equal(colour.images[:, 0], colour.images[:, 2])


@pytest.mark.parametrize(
    ("name", "labels", "tile", "message"),
    [
        ("toy_train", (0,) * 5, TILE, "has 5 labels, and toy_train.png has 6 tiles"),
        ("toy_train", (0,) * 6, 8, "has 6 labels, and toy_train.png has 24 tiles"),
        ("toy_train", (0,) * 6, 5, "48 x 32 pixels, which tiles of 5 x 5 do not fill"),
        ("toy_train", (0, 0, 7, 0, 0, 9), TILE, "example 2 has label 7, and the network has 5 classes"),
        ("toy_other", (0,) * 6, TILE, "no mosaic of part train"),
        ("toy_train", (0,) * 6, None, r"holds mosaics"),
    ],
)
def test_a_mosaic_that_is_wrong(tmp_path, anatomy, name, labels, tile, message):
    save_mosaic(tmp_path / "toy", name, labels)
    with pytest.raises(DBConvertError, match=message):
        examples_of(DataOptions(source=str(tmp_path / "toy"), tile=tile), anatomy)


def test_a_mosaic_that_is_no_picture(tmp_path):
    save_mosaic(tmp_path / "toy")
    (tmp_path / "toy" / "toy_train.png").write_bytes(b"no picture")
    with pytest.raises(DBConvertError, match=r"cannot read .*toy_train.png"):
        open_part(DataOptions(source=str(tmp_path / "toy"), tile=TILE), "train")


def test_two_mosaics_of_one_part(tmp_path):
    save_mosaic(tmp_path / "toy")
    save_mosaic(tmp_path / "toy", "other_train")
    with pytest.raises(UsageError, match=r"part train: other_train.png, toy_train.png"):
        open_part(DataOptions(source=str(tmp_path / "toy"), tile=TILE), "train")


def test_tiles_are_for_folders(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        open_part(DataOptions(source="uoft-cs/cifar100", tile=TILE), "train")


# -- class folders and tables -------------------------------------------------------------------------------------


def save_folder(folder, *, sizes=(16, 16), modes=("RGB", "RGB")):
    for label, size, mode in zip(("cat", "dog"), sizes, modes, strict=True):
        place = folder / "train" / label
        place.mkdir(parents=True)
        shape = (size, size, 3) if mode == "RGB" else (size, size)
        Image.fromarray(np.full(shape, 80, np.uint8)).save(place / "0.png")
        Image.fromarray(np.full(shape, 81, np.uint8)).save(place / "1.png")
    return str(folder)


def test_pictures_are_decoded_once(tmp_path, anatomy):
    options = DataOptions(source=save_folder(tmp_path / "pets"))
    examples = examples_of(options, anatomy)
    first = examples.__getitems__([0, 1, 2, 3])
    assert examples.kept.images.dtype == torch.uint8 and examples.kept.there.all()
    examples.dataset = None  # is not asked again
    again = examples.__getitems__([3, 1])
    assert torch.equal(again["x"], first["x"][[3, 1]]) and torch.equal(again[LABEL], first[LABEL][[3, 1]])


def test_too_many_to_keep_are_decoded_each_time(tmp_path, anatomy, monkeypatch):
    monkeypatch.setattr(pictures, "LARGEST", 4 * 3 * 16 * 16 - 1)
    examples = examples_of(DataOptions(source=save_folder(tmp_path / "pets")), anatomy)
    examples.__getitems__([0, 1, 2, 3])
    assert examples.kept.images is None


def test_resized_pictures_have_bytes_whoever_reads_them(tmp_path, anatomy):
    options = DataOptions(source=save_folder(tmp_path / "pets", sizes=(24, 9)), image=ImageOptions(size=16))
    alone = examples_of(options, anatomy)
    helped = examples_of(DataOptions(source=options.source, image=options.image, workers=1), anatomy)
    assert helped.kept is None and alone.kept is not None
    for _ in range(2):
        assert all(torch.equal(alone[i]["x"], helped[i]["x"]) for i in range(4))


@pytest.mark.parametrize(
    ("sizes", "modes", "image", "message"),
    [
        ((16, 20), ("RGB", "RGB"), None, r"example 2 has image \[3, 20, 20\], and example 0 has \[3, 16, 16\]"),
        ((16, 16), ("RGB", "L"), None, r"example 2 has image \[1, 16, 16\], and example 0 has \[3, 16, 16\]"),
        ((16, 16), ("L", "L"), ImageOptions(mean=(0.5, 0.5, 0.5)), "mean has 3 numbers, and pictures have 1 channels"),
        ((16, 16), ("RGB", "RGB"), ImageOptions(std=(0.5, 0.5)), "std has 2 numbers, and pictures have 3 channels"),
    ],
)
def test_pictures_that_do_not_fit(tmp_path, anatomy, sizes, modes, image, message):
    options = DataOptions(source=save_folder(tmp_path / "pets", sizes=sizes, modes=modes), image=image)
    with pytest.raises(DBConvertError, match=message) as caught:
        examples_of(options, anatomy).__getitems__([0, 1, 2, 3])
    assert "data.image.mode=RGB" in caught.value.hint


def test_a_mode_makes_them_fit(tmp_path, anatomy):
    source = save_folder(tmp_path / "pets", sizes=(16, 20), modes=("RGB", "L"))
    options = DataOptions(source=source, image=ImageOptions(size=16, mode="RGB", mean=(0.5, 0.5, 0.5)))
    assert examples_of(options, anatomy).__getitems__([0, 1, 2, 3])["x"].shape == (4, 3, 16, 16)


def test_a_picture_that_is_none(tmp_path, anatomy):
    source = save_folder(tmp_path / "pets")
    examples = examples_of(DataOptions(source=source), anatomy)
    file = sorted((tmp_path / "pets" / "train").rglob("*.*"))[-1]
    file.write_bytes(b"no picture")
    with pytest.raises(DBConvertError, match=r"cannot read example \d+ of the data") as caught:
        examples.__getitems__(list(range(len(examples))))
    assert file.name in caught.value.why


def test_an_empty_folder(tmp_path):
    (tmp_path / "pets" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DBConvertError, match="is empty"):
        open_part(DataOptions(source=str(tmp_path / "pets")), "train")


def test_deep_pictures_are_not_cut_off():
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(DBConvertError, match="mode I;16, which is more than 8 bits"):
        to_image(deep, None)
