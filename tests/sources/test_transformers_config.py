"""Configurations that cannot be built, code that is not trusted, and the files that travel with a model."""

import json
import shutil
from pathlib import Path

import commands
import fake_hub
import families
import networks
import pytest
import torch
from engine.conftest import QUICK

import dbconvert
from dbconvert.engine.package import open_package
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.recipe import SplitOptions

CONFIG = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own_net"

    def __init__(self, width=16, depth=4, num_labels=5, **more):
        self.width, self.depth, self.image_size, self.num_channels = width, depth, 8, 3
        super().__init__(num_labels=num_labels, **more)
"""
MODEL = """
import pathlib
import torch
from torch import nn
from transformers import PreTrainedModel
from .configuration_own import OwnConfig
from .own_layers import Layer

class OwnForImageClassification(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        pathlib.Path("executed").touch()
        self.stem = nn.Conv2d(3, config.width, 4, 4)
        self.layers = nn.ModuleList(Layer(config.width) for _ in range(config.depth))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.num_labels)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, pixel_values):
        x = self.stem(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(self.norm(x).mean(1))}
"""
LAYERS = """
from torch import nn

class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.mlp(self.norm(x))
"""
TWO = SplitOptions(blocks=2)


@pytest.fixture
def own(tmp_path):
    """A folder whose network is built by Python files of its own."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(CONFIG)
    (folder / "modeling_own.py").write_text(MODEL)
    (folder / "own_layers.py").write_text(LAYERS)
    settings = {
        "model_type": "own_net",
        "architectures": ["OwnForImageClassification"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForImageClassification": "modeling_own.OwnForImageClassification",
        },
        "width": 24,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_code_is_not_run_unasked(own):
    for act in (dbconvert.inspect, dbconvert.split):
        with pytest.raises(DBConvertError, match="its own Python code") as caught:
            act(str(own))
        assert "--trust-remote-code" in caught.value.hint and "modeling_own.py, own_layers.py" in caught.value.where
    assert sorted(p.name for p in Path().iterdir()) == ["own"]


def test_trusted_code_travels_with_the_package(own, tmp_path):
    result = dbconvert.split(str(own), out="p", options=TWO, trust=True)
    ref = result.plan.source
    assert ref.files == ("config.json", "configuration_own.py", "modeling_own.py", "own_layers.py")
    assert result.plan.anatomy.width == 24 and result.plan.task == "classification"
    shutil.rmtree(own)
    (tmp_path / "d.py").write_text(
        "import torch\ndef data(part):\n"
        "    return [{'pixel_values': torch.rand(3, 8, 8), 'label': i % 5} for i in range(20)]\n"
    )
    dbconvert.train("p", overrides=[*QUICK, "data.source=d.py:data", "train.batch=8"])
    for out in ("m.safetensors", "folder"):
        path = dbconvert.assemble(out=out)
        assert dbconvert.load(path)(torch.rand(2, 3, 8, 8)).shape == (2, 5)
    (tmp_path / "folder" / "own_layers.py").write_text(LAYERS + "\nraise SystemExit\n")
    with pytest.raises(DBConvertError, match="content has changed"):
        dbconvert.load("folder")
    dbconvert.assemble(["p"], original=True, out="back")
    assert (tmp_path / "back" / "modeling_own.py").read_text() == MODEL


def test_a_network_that_transformers_has_needs_no_trust(tmp_path):
    """Many repositories still name the code from before their network became part of Transformers."""
    networks.llama_config().save_pretrained(tmp_path / "m")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    old = {"AutoModelForCausalLM": "modeling_llama_old.LlamaForCausalLM"}
    (tmp_path / "m" / "config.json").write_text(json.dumps({**settings, "auto_map": old}))
    assert dbconvert.inspect(str(tmp_path / "m")).network == "LlamaForCausalLM"
    with pytest.raises(DBConvertError, match="lacks modeling_llama_old"):
        dbconvert.inspect(str(tmp_path / "m"), trust=True)


def test_a_configuration_of_its_own_for_a_class_of_transformers(own):
    (own / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own_net'\n"
    )
    content = {**networks.TEXT, "model_type": "own_net", "architectures": ["LlamaForCausalLM"]}
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    (own / "config.json").write_text(json.dumps({**content, "auto_map": auto_map}))
    result = dbconvert.split(str(own), out="p", options=TWO, trust=True)
    assert result.plan.source.files == ("config.json", "configuration_own.py")
    assert open_package(result.package).source().build().config.model_type == "own_net"


def test_code_of_another_repository_is_not_fetched(own):
    settings = json.loads((own / "config.json").read_text())
    settings["auto_map"] = {key: f"other/repo--{value}" for key, value in settings["auto_map"].items()}
    (own / "config.json").write_text(json.dumps(settings))
    with pytest.raises(DBConvertError, match="belongs to another repository: other/repo"):
        dbconvert.inspect(str(own), trust=True)


@pytest.mark.parametrize(
    ("settings", "message", "why"),
    [
        ("{", "cannot read", "Expecting property name"),
        ("[]", "cannot read", "not a JSON object"),
        ({"model_type": "telepathy", "architectures": ["X"]}, "cannot read", "telepathy"),
        ({"hidden_size": 30, "num_attention_heads": 7}, "cannot (build|read)", "7"),
        ({"hidden_act": "telepathy"}, "cannot build LlamaForCausalLM", "telepathy"),
        ({"vocab_size": "many"}, "cannot (build|read)", "vocab_size"),
    ],
)
def test_configurations_that_cannot_be_built(tmp_path, settings, message, why):
    folder = tmp_path / "m"
    networks.llama_config().save_pretrained(folder)
    if isinstance(settings, dict):
        settings = json.dumps({**json.loads((folder / "config.json").read_text()), **settings})
    (folder / "config.json").write_text(settings)
    with pytest.raises(DBConvertError, match=message) as caught:
        dbconvert.split(str(folder), out="p")
    assert why in caught.value.why and len(str(caught.value).splitlines()) <= 5 and not Path("p").exists()


# -- files that travel ------------------------------------------------------------------------------------------

KEPT = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json", "LICENSE")


@pytest.fixture
def vit_run(tmp_path):
    """A trained ViT whose source folder holds more than weights."""
    families.save("vit", tmp_path / "vit")
    for name in (*KEPT, "README.md", "training_args.bin", "events.out", "notes.txt"):
        (tmp_path / "vit" / name).write_text(name)
    (tmp_path / "d.py").write_text(
        "import torch\ndef data(part):\n"
        "    return [{'pixel_values': torch.rand(3, 16, 16), 'label': i % 5} for i in range(20)]\n"
    )
    dbconvert.split(str(tmp_path / "vit"), out="p", options=TWO)
    return dbconvert.train("p", overrides=[*QUICK, "data.source=d.py:data", "train.batch=8"])


def test_the_assembled_folder_can_be_passed_on(vit_run, tmp_path):
    images = torch.rand(2, 3, 16, 16)
    expected = dbconvert.load(vit_run.folder)(images)
    folder = dbconvert.assemble(out="out")
    names = {path.name for path in folder.iterdir()}
    assert names == {*KEPT, "README.md", "config.json", "model.safetensors", ".dbconvert"}
    assert all((folder / name).read_text() == name for name in KEPT)
    assert "block form only" in (folder / "README.md").read_text()
    assert torch.equal(dbconvert.load(folder)(images), expected)
    sharded = dbconvert.assemble(out="sharded", shard_bytes=30_000)
    assert len(list(sharded.glob("model-*"))) > 2 and torch.equal(dbconvert.load(sharded)(images), expected)
    with pytest.raises(UsageError, match="exists already"):
        dbconvert.assemble(out="out")
    dbconvert.assemble(out="out", force=True)
    back = dbconvert.assemble(["p"], original=True, out="back")
    assert (back / "README.md").read_text() == "README.md"
    with pytest.raises(UsageError, match="carries no plan"):
        dbconvert.load(back)
    with fake_hub.serving(tmp_path / "out", tmp_path / "cache") as environment:
        commands.dbconvert("eval", "some/vit", "data.source=d.py:data", "eval.draws=1", "--json", env=environment)
