"""Flux of diffusers: pictures as sequences, layers of two kinds that carry two streams, a time that it scales."""

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
from dbconvert.engine.twin import opened_twin
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import inject
from dbconvert.recipe import SplitOptions
from dbconvert.sources.diffusers_source import DiffusersSource
from dbconvert.sources.resolve import open_source

pytestmark = [
    pytest.mark.usefixtures("quick_splits"),
    pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed"),
]
SIZES = {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 12, "axes_dims_rope": [4, 2, 2],
}  # fmt: skip
LEVELS = 10
PICTURES = """
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.flux = FluxTransformer2DModel(**{sizes})
        self.text, self.pooled = nn.Embedding(11, 16), nn.Embedding(11, 12)

    def forward(self, images, time, label):
        tokens = nn.functional.pixel_unshuffle(images, 2).flatten(2).mT
        rows = torch.arange(16, device=images.device)
        where = torch.stack([0 * rows, rows // 4, rows % 4], 1)
        guidance = torch.full_like(time, 3.5)
        (made,) = self.flux(tokens, self.text(label)[:, None], self.pooled(label), time, where, where[:1], guidance,
                            return_dict=False)
        return nn.functional.pixel_shuffle(made.mT.unflatten(2, (4, 4)), 2)

def build_model():
    torch.manual_seed(0)
    return Pictures()

def example_inputs():
    return {{"images": torch.randn(2, 1, 8, 8), "time": torch.rand(2), "label": torch.tensor([3, 10])}}
"""
DATA = """
import torch

def pairs(part, places={places}):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=generator)
    told = lambda: {{"encoder_hidden_states": make(6, 16), "pooled_projections": make(12)}}
    where = lambda i: {{"img_ids": torch.full((9, 3), float(places(i))), "txt_ids": torch.zeros(6, 3)}}
    return [{{"hidden_states": make(9, 4), **told(), **where(i)}} for i in range(8)]
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A random Flux as a pipeline's folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(0)
    folder, scheduler = tmp_path_factory.mktemp("flux"), FlowMatchEulerDiscreteScheduler(shift=3.0)
    return saved_pipeline(folder, FluxTransformer2DModel(**SIZES), scheduler)


@pytest.fixture(scope="module")
def package(pipeline):
    dbconvert.split(str(pipeline), out=str(pipeline / "package"), options=SplitOptions(blocks=2))
    return pipeline / "package"


@pytest.fixture(scope="module")
def original(pipeline):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(pipeline / "transformer").eval()


def given(model):
    """An example input with numbers of a flow's scale."""
    inputs = DiffusersSource(None, None, SIZES).example_inputs(model)
    return {**inputs, "timestep": torch.tensor([0.2, 0.9])}


def test_what_is_found(package):
    plan = open_package(package).plan
    anatomy = plan.anatomy
    assert anatomy.verdict == "accepted" and anatomy.streams == 2
    assert anatomy.layer_paths() == (*(f"transformer_blocks.{i}" for i in range(2)),
                                     *(f"single_transformer_blocks.{i}" for i in range(2)))  # fmt: skip
    assert not any(layer.branches for layer in anatomy.layers)
    assert {read.name for read in anatomy.inputs if read.shared} == {"img_ids", "txt_ids"}
    assert anatomy.picture.time_scale == 1000
    assert plan.target.prediction == Prediction("flow", Times(scale=1.0)) and plan.target.width == 4


@torch.no_grad()
def test_all_blocks_together_are_the_original_at_ten_levels(package, original):
    """x_t = (1 - t) y + t eps, F = eps - y: y = x_t - t F; the pipeline gives its network t from 0 to 1."""
    opened = open_package(package)
    network = build_network(opened, opened.plan, read_origin(str(package), []).recipe, None, []).eval()
    inputs = given(original)
    x = inputs["hidden_states"]
    for t in torch.linspace(0.002, 0.98, LEVELS).tolist():
        theirs = x - t * original(**{**inputs, "timestep": torch.full((2,), t)}).sample
        ours = network.untold(inputs, x / (1 - t), torch.full((2,), t / (1 - t)), range(4))
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5), t


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_blocks_begin_at_the_stem_of_both_streams(original, index):
    """A layer alone computes what it computes of the embedded picture and the embedded text."""
    inputs = given(original)
    anatomy = analyse(original, inputs)
    layer = original.get_submodule(anatomy.layers[index].path)
    told = original.time_text_embed(inputs["timestep"] * 1000, inputs["pooled_projections"])
    image = original.x_embedder(inputs["hidden_states"])
    text = original.context_embedder(inputs["encoder_hidden_states"])
    where = original.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))
    _, expected = layer(image, text, told, where)
    model = type(original).from_config(original.config)
    model.load_state_dict(original.state_dict())
    run = inject(model.eval(), anatomy, blocks=4, width=8, start="original")
    run.active, run.keep = range(index, index + 1), True
    out = model(**inputs).sample
    assert torch.equal(run.leaving, expected)
    assert torch.equal(out, original.proj_out(original.norm_out(expected, told)))


def test_it_trains_and_draws_and_comes_back(pipeline, package, tmp_path):
    """Places of tokens are columns of the data too, the same in all examples; sequences may be of any length."""
    (tmp_path / "pairs.py").write_text(DATA.format(places="lambda i: 1"))
    overrides = [*QUICK, "train.batch=4", "train.steps=2", f"data.source={tmp_path / 'pairs.py'}:pairs"]
    run = dbconvert.train(str(package), overrides=overrides, out=str(tmp_path / "run"))
    checkpoint = dbconvert.assemble([str(run.folder)], out=str(tmp_path / "whole"))
    loaded = dbconvert.load(checkpoint)
    more = {"encoder_hidden_states": torch.randn(3, 6, 16), "pooled_projections": torch.randn(3, 12)}
    more |= {"img_ids": torch.ones(3, 9, 3), "txt_ids": torch.zeros(3, 6, 3)}
    images, other = (
        draw(loaded.network, loaded.intervals, 3, None, Sampling(steps=4, batch=batch), more=more, shape=(9, 4))
        for batch in (2, 3)
    )
    assert images.shape == (3, 9, 4) and torch.allclose(images, other, atol=1e-4)
    with pytest.raises(UsageError, match="sequences of 16 x 4 numbers"):
        sample(str(checkpoint), out="s")
    back = dbconvert.assemble([str(package)], out=str(tmp_path / "back.safetensors"), original=True)
    theirs, ours = load_tensors(pipeline / "transformer" / "diffusion_pytorch_model.safetensors"), load_tensors(back)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)


def test_two_streams_that_become_one():
    """Flux 2 joins its streams between its layers: blocks of either kind begin at the stem, and none hears another."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "pooled_projection_dim"}
    own = {"axes_dims_rope": [2, 2, 2, 2], "timestep_guidance_channels": 16, "guidance_embeds": False}
    model = Flux2Transformer2DModel(**{**sizes, **own}).eval()
    model.save_pretrained("flux2")
    plan = dbconvert.split("flux2", options=SplitOptions(blocks=4), dry_run=True).plan
    anatomy, inputs = plan.anatomy, open_source("flux2").example_inputs(model)
    assert [bool(layer.second_in) for layer in anatomy.layers] == [True, True, False, False]
    entered = []
    hook = model.single_transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(kwargs["hidden_states"]), with_kwargs=True
    )
    run = inject(model, anatomy, blocks=4, width=8, start="original")
    run.active = range(2, 3)
    model(**inputs)
    hook.remove()
    stem = model.context_embedder(inputs["encoder_hidden_states"]), model.x_embedder(inputs["hidden_states"])
    assert torch.equal(entered[0], torch.cat(stem, 1))
    with pytest.raises(UsageError, match="leave the last as one"):
        dbconvert.split("flux2", options=SplitOptions(blocks=4, context="features"), dry_run=True)


def test_blocks_hear_each_other(pipeline, tmp_path):
    """A block hears the picture's stream of the one before it."""
    (tmp_path / "pairs.py").write_text(DATA.format(places="lambda i: 1"))
    split = SplitOptions(blocks=2, context="features")
    package = dbconvert.split(str(pipeline), out=str(tmp_path / "package"), options=split).package
    overrides = [*QUICK, "train.batch=4", "train.steps=2", f"data.source={tmp_path / 'pairs.py'}:pairs"]
    run = dbconvert.train(str(package), overrides=overrides, out=str(tmp_path / "run"))
    hearing = load_tensors(run.folder / "weights" / "block-1.safetensors")
    assert any("context" in name for name in hearing)


def test_places_that_differ_from_example_to_example(package, tmp_path):
    (tmp_path / "pairs.py").write_text(DATA.format(places="lambda i: i"))
    overrides = [*QUICK, "train.batch=4", "train.steps=2", f"data.source={tmp_path / 'pairs.py'}:pairs"]
    with pytest.raises(DBConvertError, match="one img_ids for all examples"):
        dbconvert.train(str(package), overrides=overrides, out=str(tmp_path / "run"))


def test_a_network_that_is_told_its_guidance_too():
    """It converts, but nothing says which of two numbers an example is the time."""
    Path("distilled").mkdir()
    config = {**SIZES, "_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
    Path("distilled/config.json").write_text(json.dumps(config))
    assert dbconvert.inspect("distilled").streams == 2
    with pytest.raises(UsageError, match="several inputs could be the time: timestep, guidance"):
        dbconvert.split("distilled", task="image_diffusion", dry_run=True)


def test_a_file_around_it_gives_it_pictures(tmp_path):
    """Packed, with places, a class for a text, and a guidance that is held fixed: digits train it, and it draws."""
    (tmp_path / "model.py").write_text(PICTURES.format(sizes={**SIZES, "guidance_embeds": True}))
    result = dbconvert.split(str(tmp_path / "model.py"), out="package", options=SplitOptions(blocks=2))
    assert result.plan.anatomy.stack == "flux.transformer_blocks, flux.single_transformer_blocks"
    overrides = [*QUICK, "train.batch=4", "train.steps=2", "data.source=digits", "train.label_dropout=0.1"]
    run = dbconvert.train("package", overrides=overrides, out="run")
    sample(str(run.folder), out="s", count=2, sampling=Sampling(steps=4, guidance=2.0))
    assert len(list(Path("s").glob("0*.png"))) == 2


LARGE = {
    "FluxTransformer2DModel": {
        **SIZES, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
        "axes_dims_rope": [16, 56, 56],
    },
    "AuraFlowTransformer2DModel": {
        "num_mmdit_layers": 4, "num_single_dit_layers": 32, "attention_head_dim": 256, "num_attention_heads": 12,
        "joint_attention_dim": 16, "caption_projection_dim": 3072, "pos_embed_max_size": 1024, "sample_size": 8,
    },
}  # fmt: skip
"""Of FLUX.1-schnell, and of AuraFlow, whose sines multiply their time."""


@pytest.mark.parametrize("name", LARGE)
def test_networks_too_large_to_build_have_twins(name):
    """Configurations, shrunk: both kinds of layers stay, and the time is what it is."""
    Path("large").mkdir()
    Path("large/config.json").write_text(json.dumps({"_class_name": name, **LARGE[name]}))
    twins = (opened_twin(small, None) for small in open_source("large").twins())
    anatomy = next(twin.anatomy for twin in twins if twin is not None)
    assert anatomy.depth == 8 and len({layer.type for layer in anatomy.layers}) == 2
    assert anatomy.picture.time_scale == 1000
