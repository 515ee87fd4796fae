"""split: what the package holds, what is decided, what is refused."""

import json

import networks
import pytest
import torch
import transformers
from engine.conftest import write_model
from safetensors.torch import save_file

import dbconvert
from dbconvert.checkpoint import load_tensors
from dbconvert.engine.package import open_package
from dbconvert.errors import DBConvertError, Refused, UsageError
from dbconvert.plan import NoiseRule
from dbconvert.recipe import SplitOptions
from dbconvert.sources.resolve import open_source


def test_the_package_is_complete(package):
    names = sorted(p.name for p in package.iterdir())
    assert names == [
        ".dbconvert", "README.md", "model", "noise.json", "noise.png", "plan.json", "recipe.yaml", "train.py",
        "weights",
    ]  # fmt: skip
    opened = open_package(package)
    assert opened.plan.blocks == ((0, 1), (2, 3), (4, 4)) and opened.plan.start == "zero"
    assert opened.noise is not None and "digits" in opened.noise.basis
    assert (package / "noise.png").read_bytes()[:4] == b"\x89PNG"
    readme = (package / "README.md").read_text()
    assert all(f"| {b} |" in readme for b in range(3)) and "noise.png" in readme


def test_every_tensor_is_in_exactly_one_file(package, model_file):
    files = {p.name: load_tensors(p) for p in (package / "weights").iterdir()}
    keys = [key for tensors in files.values() for key in tensors]
    plan = open_package(package).plan
    assert len(keys) == len(set(keys)) and set(keys) == set(plan.shapes)
    original = open_source(str(model_file)).build().state_dict()
    assert set(original) <= set(keys)
    assert "layers.4.mlp.0.weight" in files["block-2.safetensors"] and "head.weight" in files["periphery.safetensors"]
    assert "dbconvert.modulation.4.linear.weight" in files["block-2.safetensors"]
    assert "dbconvert.target.weight" in files["periphery.safetensors"]


def test_the_same_split_twice_is_the_same_package(package, model_file):
    again = dbconvert.split(
        str(model_file), out="again", options=SplitOptions(blocks=3), data=open_package_data(package)
    )
    assert again.plan.identity == open_package(package).plan.identity


def open_package_data(package):
    from dbconvert.recipe import read_recipe

    return read_recipe(package / "recipe.yaml").data


def test_without_data_boundaries_are_a_preview(model_file):
    result = dbconvert.split(str(model_file), out="p")
    assert "uniform labels" in result.noise.basis and open_package(result.package).noise is None
    assert list(result.noise.boundaries) == sorted(result.noise.boundaries)


def test_options_decide(model_file):
    result = dbconvert.split(
        str(model_file),
        options=SplitOptions(layers=(1, 4), start="original", condition_width=24),
        noise=NoiseRule(rule="edm", sigma_max=10.0, sigma_data=0.3, partition="uniform", overlap=0.2),
        dry_run=True,
    )
    assert result.package is None and result.plan.blocks == ((0, 0), (1, 4))
    assert (result.plan.start, result.plan.condition_width) == ("original", 24)
    assert result.noise.boundaries[-1] == 10.0 and result.noise.sigma_data == 0.3 and result.noise.overlap == 0.2
    per_block = dbconvert.split(str(model_file), options=SplitOptions(layers_per_block=2), dry_run=True)
    assert per_block.plan.blocks == ((0, 1), (2, 3), (4, 4))


@pytest.mark.parametrize(
    ("options", "noise", "message"),
    [
        (SplitOptions(blocks=6), NoiseRule(), "6 blocks cannot be cut from 5 layers"),
        (SplitOptions(layers=(2, 2)), NoiseRule(), "add up to 4, but the stack has 5"),
        (SplitOptions(blocks=2, layers_per_block=2), NoiseRule(), "same thing twice"),
        (SplitOptions(), NoiseRule(p_mean=1.0), "belong to noise `edm`"),
        (SplitOptions(), NoiseRule(sigma_min=50.0), "noise range"),
        (SplitOptions(), NoiseRule(overlap=-1.0), "must not be negative"),
        (SplitOptions(stack="nowhere"), NoiseRule(), "no module nowhere"),
    ],
)
def test_impossible_requests_write_nothing(model_file, tmp_path, options, noise, message):
    with pytest.raises((UsageError, Refused), match=message):
        dbconvert.split(str(model_file), out="p", options=options, noise=noise)
    assert not list(tmp_path.iterdir())


def test_an_occupied_folder_is_refused_before_any_work(model_file, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "file").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        dbconvert.split(str(model_file), out="p")
    with pytest.raises(UsageError, match="not written by dbconvert"):
        dbconvert.split(str(model_file), out="p", force=True)
    assert (tmp_path / "p" / "file").read_text() == "mine"
    dbconvert.split(str(model_file), out="q")
    dbconvert.split(str(model_file), out="q", force=True, options=SplitOptions(blocks=2))
    assert len(open_package(tmp_path / "q").plan.blocks) == 2


def test_given_weights_start_at_the_original(tmp_path):
    path = write_model(tmp_path / "m")
    torch.manual_seed(7)
    trained = open_source(str(path)).build()
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        result = dbconvert.split(str(path), out=f"p-{name}", weights=str(tmp_path / name))
        assert result.plan.start == "original" and result.plan.pretrained
        stored = open_package(result.package).tensors()
        assert all(torch.equal(stored[key], value) for key, value in trained.state_dict().items())
    missing = {k: v for k, v in trained.state_dict().items() if "head" not in k}
    save_file({**missing, "extra": torch.ones(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(DBConvertError, match=r"2 missing: head.bias, head.weight; 1 unknown: extra") as caught:
        dbconvert.split(str(path), out="bad", weights=str(tmp_path / "bad.safetensors"))
    assert "do not fit" in caught.value.message


def test_a_transformers_folder(tmp_path):
    networks.vit_config().save_pretrained(tmp_path / "vit")
    result = dbconvert.split(str(tmp_path / "vit"), out="p", options=SplitOptions(blocks=2))
    assert result.plan.task == "classification" and result.plan.anatomy.stack == "vit.layers"
    config = json.loads((tmp_path / "p" / "model" / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path / "p" / "model"), transformers.ViTConfig)


def test_a_network_without_a_task_is_split_but_not_trained(tmp_path):
    config = networks.gpt2_config()
    config.architectures = ["GPT2Model"]
    config.save_pretrained(tmp_path / "gpt2")
    result = dbconvert.split(str(tmp_path / "gpt2"), out="p", options=SplitOptions(blocks=2))
    assert result.plan.task is None and "task: null" in (tmp_path / "p" / "recipe.yaml").read_text()
    assert "classification" in result.warnings[0]
    with pytest.raises(UsageError, match="no task") as caught:
        dbconvert.train("p", overrides=["data.source=digits"])
    assert "classification: the network's output is not the result of one linear head" in str(caught.value)


def test_post_norm_starts_at_the_original(tmp_path):
    networks.bert_config().save_pretrained(tmp_path / "bert")
    result = dbconvert.split(str(tmp_path / "bert"), dry_run=True)
    assert result.plan.start == "original" and not result.plan.pretrained
    with pytest.raises(Refused, match="post-norm"):
        dbconvert.split(str(tmp_path / "bert"), dry_run=True, options=SplitOptions(start="zero"))


def test_looped_layers_cannot_be_cut(tmp_path):
    config = transformers.AlbertConfig(**networks.TEXT, embedding_size=16, architectures=["AlbertForMaskedLM"])
    config.save_pretrained(tmp_path / "albert")
    assert dbconvert.inspect(str(tmp_path / "albert")).verdict == "looped"
    for blocks in (1, 2):
        with pytest.raises(Refused, match="called 4 times"):
            dbconvert.split(str(tmp_path / "albert"), dry_run=True, options=SplitOptions(blocks=blocks))


def test_conditioning_is_small_but_never_below_32():
    from dbconvert.conditioning.modulation import condition_width

    d = 768
    width = condition_width(12 * d * d, 6 * d)
    assert width % 8 == 0 and (width + 1) * 6 * d <= 0.03 * 12 * d * d
    assert condition_width(12 * 64 * 64, 6 * 64) == 32
