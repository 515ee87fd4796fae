"""Features of any network, and the Frechet distance of drawn images to the data's."""

import json
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import EXAMPLES, QUICK, write_model
from torch import nn

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.data.content import content_digest
from dbconvert.data.digits import Digits
from dbconvert.diffusion.frechet import frechet_distance
from dbconvert.engine.features import kept_moments, moments_of, open_features
from dbconvert.engine.load import load
from dbconvert.errors import DBConvertError, UsageError

PICTURES = Digits("validation").images
IMAGE = ["data.image.mean=[0.5]", "data.image.std=[0.25]"]
MODEL = """
import torch
from torch import nn

def flat():
    return nn.Flatten()

def random():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

def wide():
    return nn.Conv2d(3, 4, 3)

def five():
    return nn.Unflatten(1, (1, 1))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    (folder / "model.py").write_text(MODEL)
    return folder


@pytest.fixture(scope="module")
def classifier(place):
    """A ViT trained end-to-end for a few updates: (run, the same as a checkpoint)."""
    source = write_model(place / "vit")
    given = [f"source={source}", "train.method=end-to-end", *IMAGE, *QUICK]
    folder = dbconvert.train("vit_digits", overrides=given, out=str(place / "classifier")).folder
    return folder


@pytest.fixture(scope="module")
def generator(place):
    """A DiT of two small layers, trained for one update a block."""
    text = (EXAMPLES / "dit.py").read_text()
    small = text.replace("depth=6, width=96, heads=4", "depth=2, width=16, heads=2")
    assert small != text
    (place / "dit.py").write_text(small)
    given = [f"source={place / 'dit.py'}", "split.blocks=2", "train.steps=1", "train.batch=8", "log.every=1"]
    return dbconvert.train("dit_digits", overrides=given, out=str(place / "generator")).folder


def test_features_of_a_trained_network_are_what_enters_its_head(classifier):
    features, loaded = open_features(str(classifier)), load(classifier)
    found = features(PICTURES)
    assert found.shape == (len(PICTURES), 16)
    head = loaded.network.model.get_submodule("head")
    torch.testing.assert_close(head(found), loaded(PICTURES))  # which normalises as in training
    assert open_features(str(classifier)).fingerprint == features.fingerprint


def test_features_of_a_network_in_blocks_are_those_of_its_last_evaluation(run_of_all):
    features = open_features(str(run_of_all.folder))
    assert features(PICTURES[:3]).shape == (3, 16)
    torch.testing.assert_close(features(PICTURES[:3]), features(PICTURES)[:3])


def test_features_of_a_python_file_are_its_output(place):
    flat = open_features(f"{place / 'model.py'}:flat")
    assert torch.equal(flat(PICTURES), PICTURES.flatten(1))
    one, two = (open_features(f"{place / 'model.py'}:random") for _ in range(2))
    assert torch.equal(one(PICTURES), two(PICTURES)) and one.fingerprint == two.fingerprint != flat.fingerprint


def test_features_of_a_transformers_folder(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(DBConvertError, match="does not say how its pictures are normalised"):
        open_features(str(tmp_path / "vit"))
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    features = open_features(str(tmp_path / "vit"))
    larger = torch.rand(2, 3, 16, 16)
    assert features(larger).shape == (2, 8)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "vit").eval()
    mean = torch.tensor(settings["image_mean"]).view(3, 1, 1)
    grey = (PICTURES[:2].expand(-1, 3, -1, -1) - mean) / 0.2
    expected = model.vit(pixel_values=grey).last_hidden_state.mean(1)
    torch.testing.assert_close(features(PICTURES[:2]), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [("wide", "does not run on pictures"), ("five", "not one vector each"), ("nothing", "has no nothing")],
)
def test_networks_without_features_are_refused(name, message, place):
    with pytest.raises(DBConvertError, match=message):
        open_features(f"{place / 'model.py'}:{name}")(PICTURES)


def test_a_network_that_takes_no_pictures_is_refused(generator, tmp_path):
    with pytest.raises(UsageError, match="no features of pictures"):
        open_features(str(generator))
    with pytest.raises(UsageError, match="does not exist"):
        open_features("nowhere")


def test_moments_are_kept_by_content(place, tmp_path):
    flat, pictures = open_features(f"{place / 'model.py'}:flat"), PICTURES.split(50)
    digest = content_digest(Examples())
    first = kept_moments(flat, digest, tmp_path / "kept", pictures)
    again = kept_moments(flat, digest, tmp_path / "kept", [])  # nothing is read
    assert torch.equal(first.covariance, again.covariance) and first.count == again.count == 300
    np.testing.assert_allclose(first.covariance, np.cov(PICTURES.flatten(1).double().T), atol=1e-12)
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert frechet_distance(kept_moments(flat, digest, tmp_path / "kept", pictures), first) == pytest.approx(
        0, abs=1e-6
    )
    assert load_tensors(file)["mean"].shape == (64,)
    assert content_digest(Examples(1)) != digest != content_digest(Examples(shorter=1))


class Examples:
    """The digits; one of them changed, or one left out."""

    def __init__(self, changed=None, shorter=0):
        self.images, self.count = PICTURES.clone(), 300 - shorter
        if changed is not None:
            self.images[changed] += 0.1

    def __len__(self):
        return self.count

    def __getitems__(self, indices):
        return {"image": self.images[indices]}


def test_few_pictures_and_numbers_that_are_none_are_refused(place):
    flat = open_features(f"{place / 'model.py'}:flat")
    with pytest.raises(UsageError, match="1 pictures have no spread"):
        moments_of(flat, [PICTURES[:1]])
    with pytest.raises(DBConvertError, match="not finite"):
        moments_of(flat, [PICTURES / 0])


# -- eval -------------------------------------------------------------------------------------------------------


def test_eval_tells_the_distance_of_samples(generator, classifier, tmp_path):
    asked = [f"eval.features={classifier}", "eval.samples=40", "eval.steps=3", "eval.sigmas=0", "eval.batch=16"]
    notes = []
    found = dbconvert.evaluate(str(generator), part="validation", overrides=asked, report=notes.append).metrics
    assert found["frechet"] > 0.1 and not [n for n in notes if getattr(n, "warning", False)]
    assert found == dbconvert.evaluate(str(generator), part="validation", overrides=asked).metrics
    other = dbconvert.evaluate(str(generator), part="validation", overrides=[*asked, "eval.batch=40"]).metrics
    assert other["frechet"] == pytest.approx(found["frechet"], rel=1e-5)
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 1
    dbconvert.sample(str(generator), out="drawn", count=1)  # the blocks are where they were


def test_few_samples_are_told(generator, place):
    asked = [f"eval.features={place / 'model.py'}:flat", "eval.samples=4", "eval.steps=2", "eval.sigmas=0"]
    notes = []
    dbconvert.evaluate(str(generator), overrides=asked, report=notes.append)
    (warning,) = [note.text for note in notes if getattr(note, "warning", False)]
    assert "4 samples are too few for 64 features" in warning


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["eval.samples=4"], "by which features"),
        (["eval.features=model.py"], "none are asked for"),
        (["eval.samples=4", "eval.top_p=0.5"], "eval.top_p does not apply"),
        (["eval.samples=4", "eval.features=nowhere"], "does not exist"),
        (["eval.samples=4", "eval.features=inception"], "need torch-fidelity and torchvision"),
    ],
)
def test_eval_refuses(asked, message, generator):
    with pytest.raises(UsageError, match=message) as refused:
        dbconvert.evaluate(str(generator), overrides=asked)
    assert "inception" not in asked[-1] or "dbconvert[fid]" in refused.value.hint


def test_networks_without_images_have_no_features_to_compare(classifier):
    with pytest.raises(UsageError, match="features does not apply"):
        dbconvert.evaluate(str(classifier), overrides=["eval.features=model.py"])


# -- FID --------------------------------------------------------------------------------------------------------


class Extractor(nn.Module):
    """In the place of torch-fidelity's: it takes what that takes."""

    def __init__(self, name, features_list):
        super().__init__()
        assert features_list == ["2048"]

    def forward(self, pictures):
        assert pictures.dtype == torch.uint8 and pictures.shape[1] == 3
        return (pictures.float().flatten(1),)


def test_inception_is_given_bytes_in_colour(monkeypatch):
    """A stand-in: the real one needs torchvision and weights from the network."""
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    features = open_features("inception")
    expected = (PICTURES * 255).round().expand(-1, 3, -1, -1).flatten(1)
    assert torch.equal(features(PICTURES), expected)

    def unreachable(*_):
        raise OSError("no route to host")

    module.FeatureExtractorInceptionV3 = unreachable
    with pytest.raises(DBConvertError, match="weights of Inception cannot be fetched"):
        open_features("inception")
