"""Training on latents, and pictures drawn through them: a tiny DiT on a tiny random VAE."""

import shutil

import pytest
import torch
from conftest import EXAMPLES
from PIL import Image
from small_vae import save_vae

import dbconvert
from dbconvert.checkpoint import load_checkpoint
from dbconvert.engine.load import load
from dbconvert.engine.outline import outline
from dbconvert.engine.prepare import read_origin
from dbconvert.engine.sample import Sampling, draw
from dbconvert.errors import UsageError
from dbconvert.sources.vae import open_vae

QUICK = ["split.blocks=2", "train.steps=3", "train.batch=8", "log.every=1", "data.image=null", "data.flip=true"]
FLAT = "from torch import nn\n\n\ndef flat():\n    return nn.Flatten()\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A DiT for latents of 4 channels and 4 x 4, and the VAE."""
    folder = tmp_path_factory.mktemp("latent")
    text = (EXAMPLES / "dit.py").read_text()
    small = text.replace("size=8, patch=2, channels=1", "size=4, patch=2, channels=4")
    small = small.replace("depth=6, width=96, heads=4", "depth=2, width=16, heads=2")
    small = small.replace("torch.randn(2, 1, 8, 8)", "torch.randn(2, 4, 4, 4)")
    assert "size=4" in small and "depth=2" in small and "2, 4, 4, 4" in small
    (folder / "dit.py").write_text(small)
    (folder / "flat.py").write_text(FLAT)
    save_vae(folder / "vae")
    return folder


def given(place, *more):
    return [f"source={place / 'dit.py'}", f"data.latents.vae={place / 'vae'}", *QUICK, *more]


@pytest.fixture(scope="module")
def run(place):
    latents = f"data.latents.cache={place / 'latents'}"
    return dbconvert.train("dit_digits", overrides=given(place, latents), out=str(place / "run")).folder


@pytest.fixture(scope="module")
def checkpoint(place, run):
    return dbconvert.assemble([str(run)], out=str(place / "model.safetensors"))


def test_training_resumes_to_the_bit(place, run):
    cut = [*given(place, f"data.latents.cache={place / 'latents'}"), "train.checkpoint_every=2"]

    stopped = []

    def stop(event):
        stopped.append(event)
        if len([e for e in stopped if "loss" in getattr(e, "values", {})]) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dbconvert.train("dit_digits", overrides=cut, out="cut", report=stop)
    resumed = dbconvert.train("dit_digits", overrides=cut, out="cut", resume=True).folder
    for file in sorted((run / "weights").glob("*.safetensors")):
        one, two = (load_checkpoint(folder / "weights" / file.name)[0] for folder in (run, resumed))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_samples_are_decoded(place, run, checkpoint, tmp_path):
    sampling = Sampling(steps=3, seed=1)
    dbconvert.sample(str(run), out="drawn", count=4, classes=(3,), sampling=sampling)
    loaded, vae = load(run), open_vae(str(place / "vae"))
    latents = draw(loaded.network, loaded.intervals, 4, torch.full((4,), 3), sampling)
    assert latents.shape == (4, 4, 4, 4)
    expected = (vae.decode(latents / vae.scale) * 255).round()
    found = torch.frombuffer(bytearray(Image.open(tmp_path / "drawn" / "0002.png").tobytes()), dtype=torch.uint8)
    assert torch.equal(found.view(8, 8).float(), expected[2, 0])
    with pytest.raises(UsageError, match="draws latents of the VAE"):
        dbconvert.sample(str(checkpoint), out="unasked", count=1)
    assert not (tmp_path / "unasked").exists()
    dbconvert.sample(str(checkpoint), out="again", count=4, classes=(3,), sampling=sampling, vae=str(place / "vae"))
    assert (tmp_path / "again" / "0002.png").read_bytes() == (tmp_path / "drawn" / "0002.png").read_bytes()


def test_eval_measures_on_latents_and_compares_pictures(place, run, checkpoint):
    asked = [f"eval.features={place / 'flat.py'}:flat", "eval.samples=80", "eval.steps=2", "eval.sigmas=1"]
    metrics = dbconvert.evaluate(str(run), overrides=asked).metrics
    assert metrics["frechet"] > 0 and metrics["loss"] > 0
    source = ["data.source=digits"]
    with pytest.raises(UsageError, match="was trained on latents of"):
        dbconvert.evaluate(str(checkpoint), overrides=[*asked, *source])
    of_checkpoint = dbconvert.evaluate(
        str(checkpoint), overrides=[*asked, *source, f"data.latents.vae={place / 'vae'}"]
    ).metrics
    assert of_checkpoint == pytest.approx(metrics)


def test_paths_start_at_the_recipe(place):
    text = "source: dit.py\ntask: image_diffusion\ndata: {source: digits, latents: {vae: vae, cache: kept}}\n"
    (place / "relative.yaml").write_text(text)
    latents = read_origin(str(place / "relative.yaml"), []).recipe.data.latents
    assert (latents.vae, latents.cache) == (str(place / "vae"), str(place / "kept"))
    hub = read_origin(str(place / "relative.yaml"), ["data.latents.vae=some/vae"]).recipe.data.latents
    assert hub.vae == "some/vae"


def test_processes_read_latents_too(place, run):
    cache = f"data.latents.cache={place / 'latents'}"
    other = dbconvert.train("dit_digits", overrides=given(place, cache, "data.workers=2"), out="other").folder
    (one, two) = (load_checkpoint(folder / "weights" / "block-0.safetensors")[0] for folder in (run, other))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_dry_run_encodes_nothing(place, tmp_path):
    told = []
    planned = outline(
        "dit_digits", overrides=given(place, f"data.latents.cache={tmp_path / 'new'}"), report=told.append
    )
    assert planned.memory.units and not (tmp_path / "new").exists()
    assert any("latents are not encoded for this" in getattr(event, "text", "") for event in told)


def test_a_vae_of_other_latents_is_refused(place, run, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(4,), latent_channels=2, norm_num_groups=2).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="draws latents of 4 channels"):
        dbconvert.sample(str(run), out="drawn", count=1, vae=str(tmp_path / "other"))
    assert not (tmp_path / "drawn").exists()


def test_latents_are_for_networks_that_draw(place, tmp_path):
    vae = f"data.latents.vae={place / 'vae'}"
    with pytest.raises(UsageError, match="for networks that draw images"):
        dbconvert.train("vit_digits", overrides=[vae, "train.steps=1"], out="vit")


def test_a_vae_is_given_to_networks_of_latents_only(place, tmp_path):
    shutil.copy(EXAMPLES / "dit.py", tmp_path / "plain.py")
    text = (tmp_path / "plain.py").read_text().replace("depth=6, width=96, heads=4", "depth=2, width=16, heads=2")
    (tmp_path / "plain.py").write_text(text)
    plain = [f"source={tmp_path / 'plain.py'}", *QUICK[:4], "train.steps=1"]
    folder = dbconvert.train("dit_digits", overrides=plain, out="plain").folder
    with pytest.raises(UsageError, match="draws pictures, not latents"):
        dbconvert.sample(str(folder), out="drawn", count=1, vae=str(place / "vae"))
