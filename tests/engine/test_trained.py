"""Trained weights travel byte for byte: into packages, into networks and single blocks, and back to the original."""

from pathlib import Path

import families
import networks
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dbconvert
from dbconvert.engine.convert import single_block, whole_network
from dbconvert.engine.package import open_package
from dbconvert.errors import DBConvertError
from dbconvert.files import sha256_file
from dbconvert.graph.fake import NEEDS_NUMBERS
from dbconvert.recipe import SplitOptions
from dbconvert.sources.transformers_source import TransformersSource

TWO = SplitOptions(blocks=2)
pytestmark = pytest.mark.usefixtures("quick_splits")


def from_disk(config, folder):
    return families.model_class(config).from_pretrained(folder, dtype=torch.float32).eval()


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.fixture(scope="module")
def split_once(tmp_path_factory):
    """Each family's checkpoint and its package, made when first asked for."""
    made = {}

    def get(name, **options):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            config = families.save(name, folder / "model", **options)
            dbconvert.split(str(folder / "model"), out=str(folder / "package"), options=TWO)
            made[name] = config, folder / "model", folder / "package"
        return made[name]

    return get


@pytest.mark.parametrize("name", families.CONFIGS)
def test_the_package_holds_the_network_that_transformers_loads(split_once, name):
    config, folder, package = split_once(name)
    tensors = open_package(package).tensors()
    expected = from_disk(config, folder).state_dict()
    tied = {other for group in open_package(package).plan.anatomy.tied for other in group[1:]}
    assert {k for k in tensors if not k.startswith("dbconvert.")} == set(expected) - tied
    assert all(bits(tensors[k]) == bits(v) for k, v in expected.items() if k not in tied)


@pytest.mark.parametrize("name", families.CONFIGS)
def test_every_stored_tensor_is_copied_once_to_the_bit(split_once, name):
    _, folder, package = split_once(name)
    stored = load_file(folder / "model.safetensors")
    files = {path.name: load_file(path) for path in (package / "weights").iterdir()}
    copied = [key for tensors in files.values() for key in tensors if not key.startswith("dbconvert.")]
    assert sorted(copied) == sorted(stored)
    for tensors in files.values():
        assert all(bits(tensors[key]) == bits(stored[key]) for key in tensors if key in stored)


@pytest.mark.parametrize("name", families.CONFIGS)
def test_the_way_back_gives_the_original_to_the_bit(split_once, name):
    config, folder, package = split_once(name)
    back = dbconvert.assemble([str(package)], original=True, out="back")
    model, original = from_disk(config, back), from_disk(config, folder)
    inputs = {"pixel_values": networks.images()} if name == "vit" else {"input_ids": networks.tokens()}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, original(**inputs).logits)
    assert model.state_dict().keys() == original.state_dict().keys()
    assert (back / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_halves_stay_halves_and_shards_are_read(tmp_path):
    families.save("llama_tied", tmp_path / "m", dtype=torch.bfloat16, max_shard_size="30KB")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    result = dbconvert.split(str(tmp_path / "m"), out="p", options=TWO)
    tensors = open_package(result.package).tensors()
    kinds = {tensor.dtype for key, tensor in tensors.items() if not key.startswith("dbconvert.")}
    assert kinds == {torch.bfloat16} and "lm_head.weight" not in tensors
    back = dbconvert.assemble(["p"], original=True, out="back", shard_bytes=30_000)
    assert (back / "model.safetensors.index.json").exists()
    config = networks.llama_config()
    whole = transformers.LlamaForCausalLM.from_pretrained(back)
    assert whole.dtype == torch.bfloat16 and whole.lm_head.weight is whole.model.embed_tokens.weight
    loaded = families.model_class(config).from_pretrained(tmp_path / "m")
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_prefixes_of_the_base_model_come_and_go(tmp_path):
    """GPT-2 on the hub has no `transformer.` before its keys, and masks that no network needs any more."""
    config = families.save("gpt2", tmp_path / "with")
    stored = load_file(tmp_path / "with" / "model.safetensors")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
    assert bare.keys() != stored.keys()
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "config.json").write_bytes((tmp_path / "with" / "config.json").read_bytes())
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(networks.DEPTH)}
    save_file({**bare, **masks}, tmp_path / "without" / "model.safetensors", metadata={"format": "pt"})
    dbconvert.split(str(tmp_path / "without"), out="p", options=TWO)
    expected = from_disk(config, tmp_path / "with").state_dict()
    tensors = open_package(Path("p")).tensors()
    assert all(torch.equal(tensors[k], v) for k, v in expected.items() if k != "lm_head.weight")
    assert "h.2.attn.c_attn.weight" in load_file("p/weights/block-1.safetensors")
    back = from_disk(config, dbconvert.assemble(["p"], original=True, out="back"))
    with torch.no_grad():
        assert torch.equal(
            back(networks.tokens()).logits, from_disk(config, tmp_path / "without")(networks.tokens()).logits
        )


@pytest.mark.parametrize("name", ["vit"])
def test_whole_networks_and_single_blocks_get_the_trained_weights(split_once, name):
    config, folder, package = split_once(name)
    opened = open_package(package)
    expected = from_disk(config, folder).state_dict()
    whole = whole_network(opened.plan, opened.source())
    whole.load(opened.tensors(), where="package")
    assert all(torch.equal(whole.model.state_dict()[k], v) for k, v in expected.items())
    for block in range(2):
        alone = single_block(opened.plan, opened.source(), block, opened.tensors(block=block)).model.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in alone.items() if not k.startswith("dbconvert."))
        assert f"vit.layers.{2 * block}.attention.q_proj.weight" in alone


def test_a_large_network_s_package_is_the_same(split_once, monkeypatch):
    """Above the limit the network is never built with numbers; what conversion adds takes no memory either."""
    _, folder, package = split_once("llama")
    monkeypatch.setattr("dbconvert.engine.opening.LARGE", 0)
    result = dbconvert.split(str(folder), out="large", options=TWO)
    assert result.plan.files == open_package(package).plan.files
    modulation = next(k for k in result.plan.shapes if k.startswith("dbconvert.modulation"))
    assert modulation in load_file("large/weights/block-0.safetensors")


def test_stored_weights_are_streamed_wherever_a_twin_proves(split_once, tmp_path, monkeypatch):
    """A network that would fit is not built where a twin proves and its tensors only go from file to file."""
    _, folder, package = split_once("llama")
    monkeypatch.setattr("dbconvert.engine.opening.STREAMED", 0)
    found = dbconvert.inspect(str(folder))
    assert all("on a twin of" in check.detail for check in found.proof)
    assert dbconvert.split(str(folder), out="streamed", options=TWO).plan.files == open_package(package).plan.files
    monkeypatch.setattr(TransformersSource, "twins", lambda _: iter([]))
    built = dbconvert.inspect(str(folder))
    assert built.proof and not any("twin" in check.detail for check in built.proof) and not built.notes
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    assert dbconvert.inspect(str(bare)).proof == built.proof


def test_a_network_that_needs_its_numbers_is_built(split_once, monkeypatch):
    _, folder, _ = split_once("llama")
    monkeypatch.setattr("dbconvert.engine.opening.STREAMED", 0)

    def needs(*_, **__):
        raise NEEDS_NUMBERS[0]("item")

    monkeypatch.setattr("dbconvert.engine.opening.runnable_on_fake", needs)
    assert dbconvert.inspect(str(folder)).proof
    monkeypatch.setattr("dbconvert.engine.opening.LARGE", 0)
    with pytest.raises(DBConvertError, match="depends on numbers"):
        dbconvert.inspect(str(folder))


def test_a_state_dict_is_read_like_safetensors(tmp_path):
    config = families.save("llama_tied", tmp_path / "m")
    model = from_disk(config, tmp_path / "m")
    state = model.state_dict()
    half = list(state)[: len(state) // 2]
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({k: v for k, v in state.items() if k in half}, tmp_path / "m" / "a.bin")
    torch.save({k: v for k, v in state.items() if k not in half}, tmp_path / "m" / "b.bin")
    index = {"metadata": {}, "weight_map": {k: "a.bin" if k in half else "b.bin" for k in state}}
    import json

    (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    result = dbconvert.split(str(tmp_path / "m"), out="p", options=TWO)
    assert result.plan.pretrained and result.plan.start == "original"
    tensors = open_package(result.package).tensors()
    assert all(torch.equal(tensors[k], v) for k, v in state.items() if k != "lm_head.weight")
    assert "lm_head.weight" not in tensors
    back = from_disk(config, dbconvert.assemble(["p"], original=True, out="back"))
    with torch.no_grad():
        assert torch.equal(back(networks.tokens()).logits, model(networks.tokens()).logits)
    for name in ("a.bin", "b.bin", "pytorch_model.bin.index.json"):
        (tmp_path / "m" / name).unlink()
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    again = dbconvert.split(str(tmp_path / "m"), out="q", options=TWO)
    assert again.plan.files == result.plan.files


def test_a_weights_file_may_have_either_kind_of_keys(tmp_path):
    """Transformers' own stored keys, or the network's, as torch.save(model.state_dict()) writes them."""
    config = families.save("mixtral", tmp_path / "m")
    config.save_pretrained(tmp_path / "bare")
    state = from_disk(config, tmp_path / "m").state_dict()
    torch.save(state, tmp_path / "state.pt")
    for number, weights in enumerate((tmp_path / "m" / "model.safetensors", tmp_path / "state.pt")):
        result = dbconvert.split(str(tmp_path / "bare"), out=f"p{number}", options=TWO, weights=str(weights))
        assert result.plan.weights == str(weights)
        tensors = open_package(result.package).tensors()
        assert all(torch.equal(tensors[key], value) for key, value in state.items())


def test_weights_made_at_random_go_back_too(tmp_path):
    for name in ("vit", "mixtral", "gpt2"):
        config = families.CONFIGS[name]()
        config.save_pretrained(tmp_path / name)
        dbconvert.split(str(tmp_path / name), out=f"p-{name}", options=TWO, seed=5)
        back = dbconvert.assemble([f"p-{name}"], original=True, out=f"back-{name}")
        model, info = families.model_class(config).from_pretrained(back, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tensors = open_package(Path(f"p-{name}")).tensors()
        assert all(torch.equal(tensors[k], v) for k, v in model.state_dict().items() if k in tensors)


def test_a_model_file_goes_back_to_a_state_dict(model_file, tmp_path):
    from dbconvert.sources.resolve import open_source

    dbconvert.split(str(model_file), out="p", options=TWO)
    path = dbconvert.assemble(["p"], original=True, out="back.safetensors")
    model = open_source(str(model_file)).build()
    model.load_state_dict(load_file(path))
    assert all(torch.equal(open_package(Path("p")).tensors()[k], v) for k, v in model.state_dict().items())
    assert not Path("back.source").exists()


def test_a_changed_package_is_told(split_once, tmp_path):
    import shutil

    _, _, package = split_once("vit")
    shutil.copytree(package, "copy")
    file = Path("copy/weights/block-0.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DBConvertError, match="content differs"):
        dbconvert.assemble(["copy"], original=True, out="back")
    assert not Path("back").exists() and sha256_file(file)
