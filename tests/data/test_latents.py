"""Latents on disk: what they are of, that they are encoded once, and what other folders and VAEs are told."""

import shutil
import sys

import pytest
import torch
from small_vae import save_vae

from dbconvert.anatomy import Input
from dbconvert.data import latents as module
from dbconvert.data.datasets import open_part
from dbconvert.data.examples import LABEL, Examples
from dbconvert.data.images import drawn, to_image
from dbconvert.data.latents import open_latents
from dbconvert.data_options import DataOptions, ImageOptions, LatentOptions, RandAugment
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.sources.vae import open_vae


class Takes:
    """The one fact of an anatomy that examples read."""

    inputs = (Input("image", (2, 4, 4, 4), "float32"),)


def pictures(part="train", image=None, images=None):
    """A part of the digits, or images of one's own."""
    options = DataOptions(source="digits", image=image)
    rows = None if images is None else [{"image": value, "label": 0} for value in images]
    return Examples(rows or open_part(options, part), options, Takes, 10)


def options(vae, **more):
    data = {key: more.pop(key) for key in ("flip", "image", "randaugment") if key in more}
    return DataOptions(source="digits", latents=LatentOptions(vae=str(vae), batch=256, **more), **data)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "one")


@pytest.fixture(scope="module")
def encoded(vae, tmp_path_factory):
    """The folder of the training part and its mirror images, and what was told meanwhile."""
    folder, told = tmp_path_factory.mktemp("latents") / "cache", []
    open_latents(pictures(), "image", options(vae, cache=str(folder), flip=True), training=True, report=told.append)
    return folder, told


def files(folder):
    return sorted(path for path in folder.rglob("*.safetensors"))


def test_latents_are_the_means_of_the_posterior(vae, encoded):
    opened, images = open_vae(str(vae)), pictures()
    found = open_latents(images, "image", options(vae, cache=str(encoded[0])), training=False)
    for indices in ([0, 1, 2], [1196, 5, 1024]):
        mean, _ = opened.encode(images.__getitems__(indices)["image"])
        batch = found.__getitems__(indices)
        torch.testing.assert_close(batch["image"], mean * opened.scale, rtol=1e-3, atol=1e-3)
        assert torch.equal(batch[LABEL], images.__getitems__(indices)[LABEL])
    assert torch.equal(found.label_counts(), images.label_counts()) and len(found) == len(images)
    other = open_latents(images, "image", options(vae, cache=str(encoded[0]), scale=3.0), training=False)
    expected = found.__getitems__([7])["image"] / opened.scale * 3
    torch.testing.assert_close(other.__getitems__([7])["image"], expected)


def test_training_draws_from_the_posteriors_of_a_picture_and_of_its_mirror_image(vae, encoded):
    opened, images = open_vae(str(vae)), pictures()
    found = open_latents(images, "image", options(vae, cache=str(encoded[0]), flip=True), training=True)
    posteriors = found.__getitems__([3, 1100])["image"]
    given = images.__getitems__([3, 1100])["image"]
    for view, shown in enumerate((given, given.flip(-1))):
        mean, std = opened.encode(shown)
        torch.testing.assert_close(posteriors[:, view, 0], mean * opened.scale, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(posteriors[:, view, 1], std * opened.scale, rtol=1e-3, atol=1e-3)
    torch.manual_seed(0)
    many = drawn(posteriors[:1].expand(4000, *posteriors.shape[1:]))
    mean, std = posteriors[0].unbind(1)
    torch.testing.assert_close(many.mean(0), mean.mean(0), atol=0.08, rtol=0)
    spread = (std**2).mean(0) + mean.var(0, correction=0)
    torch.testing.assert_close(many.var(0), spread, atol=0, rtol=0.15)
    without = open_latents(images, "image", options(vae, cache=str(encoded[0])), training=True)
    assert without.__getitems__([3])["image"].shape == (1, 1, 2, 4, 4, 4)


def test_nothing_is_encoded_twice(vae, encoded, monkeypatch):
    monkeypatch.setattr(module, "encoded", None)
    told = []
    open_latents(pictures(), "image", options(vae, cache=str(encoded[0]), flip=True), training=True, report=told.append)
    assert not told


def test_the_size_is_told_first(encoded):
    folder, told = encoded
    text = told[0].text
    assert "1,197 pictures and of their mirror images" in text
    size = float(text.partition(" MB")[0].rpartition(" ")[2])
    assert size == pytest.approx(sum(file.stat().st_size for file in files(folder)) / 1e6, abs=0.06)
    assert [event.name for event in told if hasattr(event, "name")] == [
        "encoding pictures",
        "encoding mirrored pictures",
    ]


def test_a_killed_run_goes_on_and_gives_the_same(vae, encoded, tmp_path, monkeypatch):
    real = module.encoded

    def killed(images, indices, *given, **named):
        if indices[0] >= 1024:
            raise KeyboardInterrupt
        return real(images, indices, *given, **named)

    monkeypatch.setattr(module, "encoded", killed)
    mine = options(vae, cache=str(tmp_path / "mine"))
    with pytest.raises(KeyboardInterrupt):
        open_latents(pictures(), "image", mine, training=False)
    assert [file.name for file in files(tmp_path / "mine")] == ["00000.safetensors"]
    assert not list((tmp_path / "mine").rglob("*.tmp"))
    first = files(tmp_path / "mine")[0].stat().st_mtime_ns
    monkeypatch.setattr(module, "encoded", real)
    open_latents(pictures(), "image", mine, training=False)
    assert files(tmp_path / "mine")[0].stat().st_mtime_ns == first
    plain = [file for file in files(encoded[0]) if "mirrored" not in file.parent.name]
    assert [f.read_bytes() for f in files(tmp_path / "mine")] == [f.read_bytes() for f in plain]


def test_a_damaged_shard_is_encoded_again(vae, encoded, tmp_path):
    shutil.copytree(encoded[0], tmp_path / "copy")
    damaged = files(tmp_path / "copy")[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-10])
    open_latents(pictures(), "image", options(vae, cache=str(tmp_path / "copy"), flip=True), training=True)
    assert damaged.read_bytes() == whole


def test_other_data_have_a_folder_of_their_own(vae, encoded, tmp_path):
    shutil.copytree(encoded[0], tmp_path / "copy")
    open_latents(pictures("test"), "image", options(vae, cache=str(tmp_path / "copy")), training=False)
    assert len(files(tmp_path / "copy")) == len(files(encoded[0])) + 1


def test_without_a_folder_each_vae_and_size_has_its_own_in_the_cache(vae, tmp_path):
    other = save_vae(tmp_path / "other", seed=1)
    for each in (vae, other, vae):
        open_latents(pictures("test"), "image", options(each), training=False)
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 2


# -- refusals ---------------------------------------------------------------------------------------------------


def unchanged(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_cache_of_another_vae_is_refused(encoded, tmp_path):
    before = unchanged(encoded[0])
    other = save_vae(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="holds latents of another VAE") as refused:
        open_latents(pictures(), "image", options(other, cache=str(encoded[0])), training=False)
    assert "nothing in it was changed" in str(refused.value) and unchanged(encoded[0]) == before


@pytest.mark.parametrize(
    ("image", "message"),
    [(ImageOptions(crop=True), "that were not cropped"), (ImageOptions(size=16), "1 x 8 x 8, not 1 x 16 x 16")],
)
def test_a_cache_of_another_crop_is_refused(image, message, vae, encoded):
    before = unchanged(encoded[0])
    made = pictures(image=image)
    with pytest.raises(UsageError, match=message):
        open_latents(made, "image", options(vae, cache=str(encoded[0]), image=image), training=False)
    assert unchanged(encoded[0]) == before


def test_a_folder_of_something_else_is_refused(vae, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(UsageError, match="holds no latents, and is not empty"):
        open_latents(pictures(), "image", options(vae, cache=str(tmp_path / "thesis")), training=False)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"image": ImageOptions(mean=(0.5,))}, r"data\.image\.mean and data\.image\.std do not apply"),
        ({"randaugment": RandAugment()}, r"data\.randaugment does not apply"),
    ],
)
def test_what_does_not_apply_to_latents_is_refused(more, message, vae):
    with pytest.raises(UsageError, match=message):
        open_latents(pictures(), "image", options(vae, **more), training=False)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.zeros(3, 8, 8)], "takes 1 channels, and the pictures have 3"),
        ([torch.zeros(1, 9, 9)], "multiple of 2"),
        ([torch.zeros(1, 8, 8), torch.zeros(1, 4, 4)], "and example 0 has"),
        ([torch.full((1, 8, 8), 7.0)], r"not in \[0, 1\]"),
    ],
)
def test_pictures_that_a_vae_does_not_take_are_refused(images, message, vae, tmp_path):
    with pytest.raises(DBConvertError, match=message):
        open_latents(pictures(images=images), "image", options(vae, cache=str(tmp_path / "new")), training=False)
    assert not files(tmp_path)


def test_what_is_no_vae_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DBConvertError, match="cannot read a VAE from"):
        open_vae(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="there is no VAE"):
        open_vae(str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DBConvertError, match="needs diffusers") as refused:
        open_vae(str(tmp_path / "empty"))
    assert "dbconvert[diffusion]" in refused.value.hint


def test_a_crop_is_the_square_in_the_middle():
    wide = torch.arange(24.0).view(1, 2, 12) / 24
    assert torch.equal(to_image(wide, None, crop=True), wide[:, :, 5:7])
    assert torch.equal(to_image(wide.transpose(1, 2), None, crop=True), wide.transpose(1, 2)[:, 5:7])
    assert to_image(wide, 4, crop=True).shape == (1, 4, 4)
