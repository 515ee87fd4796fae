"""Data sources, columns, pictures and the order of batches."""

import networks
import numpy as np
import pytest
import torch
from PIL import Image

from dbconvert.data.batches import OrderedBatches, block_order, load_batches
from dbconvert.data.datasets import open_part
from dbconvert.data.digits import PARTS, Digits
from dbconvert.data.examples import LABEL, Examples
from dbconvert.data.images import augmentation, flip, normalise, to_image
from dbconvert.data_options import DataOptions, ImageOptions, LatentOptions, RandAugment
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.graph.analysis import analyse


@pytest.fixture(scope="module")
def anatomy():
    return analyse(*networks.build("vit"))


def test_digits_parts_are_fixed_and_disjoint():
    parts = {name: Digits(name) for name in PARTS}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 1197,
        "validation": 300,
        "test": 300,
    }
    pictures = torch.cat([part.images.flatten(1) for part in parts.values()])
    assert len(pictures) == 1797 and len(pictures.unique(dim=0)) > 1790
    assert parts["test"].labels[:8].tolist() == Digits("test").labels[:8].tolist()
    assert pictures.min() >= 0 and pictures.max() <= 1


def test_order_is_a_function_of_seed_block_and_update():
    order = block_order([0, 1, 2], 10, "random", 1, seed=5)
    assert sorted(order) == sorted([0, 1, 2] * 10) and order != sorted(order)
    together = list(OrderedBatches(50, 8, order, seed=5))
    for block in range(3):
        alone = list(OrderedBatches(50, 8, [block] * 10, seed=5))
        assert alone == [batch for batch, b in zip(together, order, strict=True) if b == block]
    assert together[13:] == list(OrderedBatches(50, 8, order, seed=5, start=13))
    assert together != list(OrderedBatches(50, 8, order, seed=6))


def test_an_epoch_uses_every_example_once():
    batches = list(OrderedBatches(48, 8, [0] * 6, seed=0))
    assert sorted(i for batch in batches for i in batch) == list(range(48))


def test_processes_share_a_batch():
    whole = list(OrderedBatches(50, 8, [0, 0], seed=0))
    halves = [list(OrderedBatches(50, 8, [0, 0], seed=0, rank=r, world=2)) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]


def test_rotation_takes_turns():
    assert block_order([0, 1], 3, "rotate", 1, seed=0) == [0, 1, 0, 1, 0, 1]
    assert block_order([0, 1], 3, "rotate", 2, seed=0) == [0, 0, 1, 1, 0, 1]


def test_pictures_become_tensors():
    grey = Image.fromarray(np.full((4, 4), 255, np.uint8))
    assert to_image(grey, None).shape == (1, 4, 4) and to_image(grey, None).max() == 1
    assert to_image(grey.convert("RGBA"), 8).shape == (3, 8, 8)
    assert to_image(torch.full((3, 4, 4), 255, dtype=torch.uint8), None).max() == 1
    scaled = normalise(torch.full((1, 1, 2, 2), 0.5), ImageOptions(mean=(0.5,), std=(0.25,)))
    assert scaled.abs().max() == 0


def test_pictures_have_gradients_after_a_prediction_in_inference_mode():
    options = ImageOptions(mean=(0.25,), std=(0.125,))
    with torch.inference_mode():
        normalise(torch.ones(1, 1, 2, 2), options)
    image = torch.ones(1, 1, 2, 2, requires_grad=True)
    normalise(image, options).sum().backward()
    assert torch.equal(image.grad, torch.full((1, 1, 2, 2), 8.0))


def test_augmentation_is_random_but_seeded():
    pictures = torch.rand(16, 3, 8, 8)
    torch.manual_seed(0)
    mirrored = flip(pictures)
    same = [torch.equal(a, b) for a, b in zip(mirrored, pictures, strict=True)]
    assert 0 < sum(same) < 16
    augment = augmentation(DataOptions(flip=True, randaugment=RandAugment(operations=2, magnitude=9)))
    torch.manual_seed(1)
    first = augment(pictures)
    torch.manual_seed(1)
    assert torch.equal(first, augment(pictures)) and first.shape == pictures.shape
    assert not torch.equal(first, pictures)
    with pytest.raises(UsageError, match="31, and 30 is the largest"):
        augmentation(DataOptions(randaugment=RandAugment(magnitude=31)))


def save_class_folders(folder):
    for label in ("cat", "dog"):
        (folder / "train" / label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((4, 4, 3), 40 * i, np.uint8)).save(folder / "train" / label / f"{i}.png")


def test_a_folder_of_class_folders(tmp_path, anatomy):
    save_class_folders(tmp_path / "pets")
    options = DataOptions(source="pets", image=ImageOptions(size=16))
    examples = Examples(open_part(options, "train"), options, anatomy, classes=5)
    batch = examples.__getitems__([0, 5])
    assert batch["x"].shape == (2, 3, 16, 16) and batch[LABEL].tolist() == [0, 1]
    assert examples.label_counts().tolist() == [3, 3, 0, 0, 0]


def test_parquet(tmp_path, anatomy):
    import datasets

    rows = {"picture": [[[[0.0]]]] * 4, "kind": [0, 1, 2, 1], "name": list("abcd")}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "d.parquet")
    options = DataOptions(source="d.parquet", label="kind", input="picture")
    examples = Examples(open_part(options, "train"), options, anatomy, classes=5)
    assert examples.label_counts().tolist() == [1, 2, 1, 0, 0]


@pytest.mark.parametrize(
    ("revision", "asked"),
    [
        ("v1", {"revision": "v1", "name": "plain"}),
        ("refs/convert/parquet", {"revision": "refs/convert/parquet", "data_dir": "plain"}),
    ],
)
def test_a_hub_id_has_a_configuration_and_a_revision(monkeypatch, revision, asked):
    import datasets

    seen = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: seen.append((path, options)) or "the part")
    options = DataOptions(source="org/pictures", config="plain", revision=revision)
    assert open_part(options, "train[:9]") == "the part"
    assert seen == [("org/pictures", {"split": "train[:9]", **asked})]


FUNCTION = """
class Data:
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
def data(part):
    import torch
    return Data([{"image": torch.zeros(3, 4, 4), "label": i} for i in range(2 if part == "train" else 9)])
def empty(part): return []
def pairs(part): return Data([(1, 2)])
def strings(part): return Data([{"image": 0, "label": "cat"}])
def unlabelled(part): return Data([{"image": 0}])
def two(part): return Data([{"a": 0, "b": 0, "label": 0}])
def flat(part): return Data([{"image": [[0.0]], "label": 0}])
def broken(part): return 1 / 0
def number(part): return 3
"""


@pytest.mark.parametrize(
    ("source", "part", "message"),
    [
        ("d.py:data", "validation", "label 5, and the network has 5 classes"),
        ("d.py:empty", "train", "is empty"),
        ("d.py:pairs", "train", "tuples, not dicts"),
        ("d.py:strings", "train", "not a whole number"),
        ("d.py:unlabelled", "train", "no column label"),
        ("d.py:two", "train", "which column"),
        ("d.py:flat", "train", r"column image has shape \[1, 1, 1\], and the split saw"),
        ("d.py:broken", "train", "ZeroDivisionError"),
        ("d.py:number", "train", "not a map-style dataset"),
        ("d.py:absent", "train", "no function absent"),
        ("absent.py:data", "train", "does not exist"),
        ("digits", "rehearsal", "no part rehearsal"),
        ("nowhere", "train", "does not exist"),
        ("d.py", "train", "not a parquet file"),
        (None, "train", "no data is given"),
    ],
)
def test_bad_data_is_told(tmp_path, anatomy, source, part, message):
    (tmp_path / "d.py").write_text(FUNCTION)
    options = DataOptions(source=source)
    with pytest.raises((DBConvertError, UsageError), match=message):
        Examples(open_part(options, part), options, anatomy, classes=5).label_counts()


@pytest.mark.parametrize(
    ("latents", "hint"),
    [
        (None, "data.image.size=16 resizes pictures, data.image.mode=RGB"),
        (LatentOptions(vae="v"), "data.image.size resizes pictures"),
    ],
)
def test_pictures_of_two_sizes_are_told_the_network_s(tmp_path, anatomy, latents, hint):
    """Where a VAE reads them, theirs is not the network's."""
    (tmp_path / "d.py").write_text(FUNCTION.replace("torch.zeros(3, 4, 4)", "torch.zeros(3, 4 + i, 4)"))
    options = DataOptions(source="d.py:data", latents=latents)
    with pytest.raises(DBConvertError, match=r"example 1 has image \[3, 5, 4\], and example 0") as caught:
        Examples(open_part(options, "train"), options, anatomy, classes=5)[1]
    assert caught.value.hint.startswith(hint)


def test_workers_give_the_same_batches(tmp_path, anatomy):
    (tmp_path / "d.py").write_text(FUNCTION.replace("torch.zeros(3, 4, 4)", "torch.full((3, 4, 4), float(i))"))
    options = DataOptions(source="d.py:data")
    examples = Examples(open_part(options, "all"), options, anatomy, classes=9)
    order = OrderedBatches(9, 4, [0, 1, 0], seed=1)
    alone, helped = ([b["x"] for b in load_batches(examples, order, workers)] for workers in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
