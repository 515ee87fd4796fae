"""Transformers sources: a folder with or without weights, a hub id behind a faked endpoint, a plan's own config."""

import commands
import fake_hub
import networks
import pytest
import torch
import transformers

from dbconvert.checkpoint import load_tensors
from dbconvert.errors import DBConvertError
from dbconvert.sources.resolve import open_source, reopen_source


def folder_with(config, path, weights=False):
    if weights:
        getattr(transformers, config.architectures[0])(config).save_pretrained(path)
    else:
        config.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "make", [networks.vit_config, networks.gpt2_config, networks.llama_config, networks.bert_config]
)
def test_a_folder_without_weights(tmp_path, make):
    source = open_source(folder_with(make(), tmp_path / "m"))
    model = source.build()
    inputs = source.example_inputs(model)
    with torch.no_grad():
        model.eval()(**inputs)
    assert source.trained(fetch=True) is None
    assert reopen_source(source.ref, []).ref == source.ref.__class__(**{**source.ref.__dict__, "location": ""})


def test_a_folder_with_weights(tmp_path):
    torch.manual_seed(0)
    location = folder_with(networks.vit_config(), tmp_path / "m", weights=True)
    source = open_source(location)
    model = source.build().eval()
    trained = transformers.ViTForImageClassification.from_pretrained(location).eval()
    model.load_state_dict(source.to_network(load_tensors(tmp_path / "m" / "model.safetensors")))
    inputs = source.example_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, trained(**inputs).logits)


def test_wrong_folders(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DBConvertError, match="cannot read a Transformers configuration"):
        open_source(str(tmp_path))
    networks.TEXT and transformers.LlamaConfig(**networks.TEXT).save_pretrained(tmp_path)
    with pytest.raises(DBConvertError, match="names no architecture"):
        open_source(str(tmp_path))
    transformers.LlamaConfig(**networks.TEXT, architectures=["LlamaForTelepathy"]).save_pretrained(tmp_path)
    with pytest.raises(DBConvertError, match="has no LlamaForTelepathy"):
        open_source(str(tmp_path))


@pytest.fixture
def hub(tmp_path):
    folder_with(networks.vit_config(), tmp_path / "hub", weights=True)
    with fake_hub.serving(tmp_path / "hub", tmp_path / "cache") as environment:
        yield environment


def test_a_hub_id(hub):
    found = commands.as_json("inspect", "some/vit", "--json", env=hub)
    assert (found["verdict"], found["layers"], found["stack"]) == ("accepted", networks.DEPTH, "vit.layers")
    result = commands.as_json("split", "some/vit", "--blocks", 2, "--json", "-o", "pkg", env=hub)
    assert result["start"] == "original" and any("forget" in warning for warning in result["warnings"])
