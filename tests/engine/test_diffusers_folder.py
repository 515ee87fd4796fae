"""Folders of diffusers: a denoiser alone or in a pipeline, its weights, and what its scheduler says of its training."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from engine.conftest import QUICK, saved_pipeline

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.diffusion.predictions import Prediction, Times
from dbconvert.engine.package import open_package
from dbconvert.engine.prepare import build_network, read_origin
from dbconvert.engine.sample import Sampling, draw, sample
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.recipe import SplitOptions
from dbconvert.sources.diffusers_source import DiffusersSource, told_by
from dbconvert.sources.resolve import open_source

pytestmark = [
    pytest.mark.usefixtures("quick_splits"),
    pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed"),
]
SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 2, "num_layers": 3,
    "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 10, "norm_num_groups": 4,
}  # fmt: skip
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A random denoiser that predicts v, as a pipeline's folder."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    torch.manual_seed(0)
    folder, scheduler = tmp_path_factory.mktemp("pipeline"), DDIMScheduler(prediction_type="v_prediction")
    return saved_pipeline(folder, DiTTransformer2DModel(**SIZES), scheduler)


@pytest.fixture(scope="module")
def package(pipeline):
    dbconvert.split(str(pipeline), out=str(pipeline / "package"), options=SplitOptions(blocks=3))
    return pipeline / "package"


def test_the_scheduler_tells_what_it_predicts(package):
    plan = open_package(package).plan
    assert plan.source.kind == "diffusers" and plan.pretrained and plan.start == "original"
    assert plan.target.prediction == Prediction("v", Times())
    assert "predicts v by 1000 times, betas linear from 0.0001 to 0.02." in (package / "README.md").read_text()
    low, high = plan.target.prediction.range()
    assert plan.preview.boundaries[0] == pytest.approx(low) and plan.preview.boundaries[-1] == 80.0 < high


@torch.no_grad()
def test_all_blocks_together_are_the_original(pipeline, package):
    """At a level of its own schedule, D is what diffusers' scheduler calls the original sample."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(pipeline / "transformer").eval()
    scheduler = DDIMScheduler.from_pretrained(pipeline / "scheduler", clip_sample=False)
    scheduler.set_timesteps(1000)
    opened = open_package(package)
    network = build_network(opened, opened.plan, read_origin(str(package), []).recipe, None, []).eval()
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([3, 10])
    sigmas = opened.plan.target.prediction.times.log_sigmas().exp()
    for t in (0, 300, 700):
        out = model(x, torch.tensor([t, t]), label).sample[:, :1]
        theirs = scheduler.step(out, t, x).pred_original_sample
        z, sigma = x * float((1 + sigmas[t] ** 2).sqrt()), sigmas[t].float().repeat(2)
        ours = network.untold({"hidden_states": z, "class_labels": label}, z, sigma, range(3))
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_it_trains_and_draws_and_comes_back(pipeline, package, tmp_path):
    overrides = [*QUICK, "train.steps=2", "data.source=digits", "train.label_dropout=0.1"]
    run = dbconvert.train(str(package), overrides=overrides, out=str(tmp_path / "run"))
    checkpoint = dbconvert.assemble([str(run.folder)], out=str(tmp_path / "whole"))
    sample(str(checkpoint), out="s", count=3, sampling=Sampling(steps=4, guidance=2.0))
    assert len(list(Path("s").glob("0*.png"))) == 3
    back = dbconvert.assemble([str(package)], out="back/diffusion_pytorch_model.safetensors", original=True)
    theirs = load_tensors(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    ours = load_tensors(back)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)


def test_a_denoiser_alone(pipeline):
    """Without a scheduler nothing is told, and from scratch nothing is asked."""
    alone = open_source(str(pipeline / "transformer"))
    assert isinstance(alone, DiffusersSource) and alone.prediction() == open_source(str(pipeline)).prediction()
    config = json.loads((pipeline / "transformer" / "config.json").read_text())
    Path("scratch").mkdir()
    Path("scratch/config.json").write_text(json.dumps(config))
    plan = dbconvert.split("scratch", options=SplitOptions(blocks=3), dry_run=True).plan
    assert not plan.pretrained and plan.target.prediction.kind == "edm" and plan.preview.boundaries[0] == 0.002


@pytest.mark.parametrize(
    ("scheduler", "found"),
    [
        ({**LINEAR, "prediction_type": "epsilon"}, Prediction("epsilon", Times())),
        (
            {**LINEAR, "beta_schedule": "scaled_linear", "beta_end": 0.012, "prediction_type": "v_prediction"},
            Prediction("v", Times("scaled_linear", beta_end=0.012)),
        ),
        ({"num_train_timesteps": 1000, "shift": 3.0}, Prediction("flow", Times(scale=1000.0))),
        ({"sigma_data": 0.5, "prediction_type": "epsilon"}, Prediction("edm")),
    ],
)
def test_schedulers(scheduler, found):
    assert told_by(scheduler, "x") == found


@pytest.mark.parametrize(
    "scheduler",
    [
        {**LINEAR, "prediction_type": "sample"},
        {**LINEAR, "beta_schedule": "sigmoid"},
        {**LINEAR, "rescale_betas_zero_snr": True},
    ],
)
def test_schedulers_without_a_change_of_variables(scheduler):
    with pytest.raises(DBConvertError, match="no change of variables"):
        told_by(scheduler, "x")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "Nonesuch"}, "diffusers has no Nonesuch"),
        ({**SIZES, "_class_name": "DiTTransformer2DModel", "norm_type": "none"}, "diffusers cannot build"),
    ],
)
def test_configurations_that_cannot_be_built(config, message):
    Path("bad").mkdir()
    Path("bad/config.json").write_text(json.dumps(config))
    with pytest.raises(DBConvertError, match=message):
        dbconvert.inspect("bad")


def test_a_pipeline_without_a_denoiser():
    Path("empty").mkdir()
    Path("empty/model_index.json").write_text("{}")
    with pytest.raises(DBConvertError, match="has no transformer or unet"):
        dbconvert.inspect("empty")


TEXTS = """
import torch

def pairs(part):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=generator)
    more = lambda: {{"encoder_hidden_states": make(6, 16), {pooled}}}
    return [{{"hidden_states": make(4, 8, 8), **more()}} for _ in range(8)]
"""


def pixart():
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=4, caption_channels=16, cross_attention_dim=16, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip


def sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=4, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12,
        pos_embed_max_size=16,
    )  # fmt: skip


@pytest.mark.parametrize(("make", "pooled"), [(pixart, ""), (sd3, '"pooled_projections": make(12)')])
def test_other_inputs_come_from_the_data(make, pooled, tmp_path):
    """PixArt and SD3 are told a text, no class: its columns are read, and from Python they draw."""
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "network")
    (tmp_path / "pairs.py").write_text(TEXTS.format(pooled=pooled))
    package = dbconvert.split(str(tmp_path / "network"), options=SplitOptions(blocks=3)).package
    overrides = [*QUICK, "train.batch=4", "train.steps=2", f"data.source={tmp_path / 'pairs.py'}:pairs"]
    loaded = dbconvert.load(dbconvert.train(str(package), overrides=overrides, out="r").folder)
    more = {"encoder_hidden_states": torch.randn(3, 6, 16)}
    more |= {"pooled_projections": torch.randn(3, 12)} if pooled else {}
    images = draw(loaded.network, loaded.intervals, 3, None, Sampling(steps=4, batch=2), more=more)
    other = draw(loaded.network, loaded.intervals, 3, None, Sampling(steps=4), more=more)
    assert images.shape == (3, 4, 8, 8) and torch.allclose(images, other, atol=1e-4)
    with pytest.raises(UsageError, match="also takes encoder_hidden_states"):
        sample("r", out="s")


def test_blocks_of_two_streams_begin_at_the_stem():
    """A block of an SD3 computes what its layers compute of the embedded image and the embedded text."""
    from dbconvert.graph.analysis import analyse
    from dbconvert.graph.inject import inject

    torch.manual_seed(0)
    model = sd3().eval()
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 6, 16)}
    given |= {"timestep": torch.tensor([3.0, 9.0]), "pooled_projections": torch.randn(2, 12), "return_dict": False}
    stem = model.pos_embed(given["hidden_states"]), model.context_embedder(given["encoder_hidden_states"])
    told = model.time_text_embed(given["timestep"], given["pooled_projections"])
    _, expected = model.transformer_blocks[1](stem[0], stem[1], told)
    anatomy = analyse(model, given)
    assert anatomy.streams == 2 and anatomy.layers[0].second_in == ("encoder_hidden_states",)
    run = inject(model, anatomy, blocks=3, width=8, start="original")
    run.active, run.keep = range(1, 2), True
    model(**given)
    assert torch.equal(run.leaving, expected)
