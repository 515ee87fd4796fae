"""Records read strictly and say where a mistake stands."""

import pytest

from dbconvert.errors import DBConvertError, UsageError
from dbconvert.plan import NoiseFit, cut, parse_plan
from dbconvert.recipe import Recipe, read_recipe
from dbconvert.schema import identity, parse, to_data, to_yaml


def write(path, text):
    path.write_text(text)
    return path


def test_unknown_key_names_file_line_and_nearest_key(tmp_path):
    path = write(tmp_path / "r.yaml", "source: model.py\ntrain:\n  steps: 3\n  bacth: 32\n")
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert caught.value.message == "unknown key train.bacth"
    assert caught.value.where == f"{path}:4" and caught.value.hint == "did you mean batch?"


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("source: m.py\ntrain: {steps: many}", "", "train.steps = 'many'"),
        ("source: m.py\ntrain: {batch: 0}", "", "train.batch = 0"),
        ("source: m.py\ndata: {image: {std: [0.0]}}", "", r"data.image.std.0 = 0.0: input should be greater than 0"),
        ("source: m.py", "data.image.std=[0.2, -0.2, 0.2]", r"data.image.std.1 = -0.2"),
        ("source: m.py\nnoise: {rule: edn}", "", "noise.rule = 'edn'"),
        ("source: m.py\npackage: p", "", "either a source or a package"),
        ("seed: 1", "", "either a source or a package"),
        ("package: p\nsplit: {blocks: 2}", "", "split was decided"),
        ("package: p", "noise.overlap=0.2", "noise was decided"),
        ("source: m.py\ntrain: {steps: 1, epochs: 1}", "", "both given"),
        ("source: m.py\ntrain: {batch: 10, accumulate: 3}", "", "not a multiple"),
        ("source: m.py", "train.steps", "not an override"),
        ("source: m.py", "trian.steps=3", "unknown key trian"),
        ("- 1", "", "not a mapping"),
        ("a: [", "", "cannot read"),
    ],
)
def test_mistakes_are_refused(tmp_path, text, override, message):
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        read_recipe(path, [override] if override else [])


def test_overrides_win_and_are_yaml(tmp_path):
    path = write(tmp_path / "r.yaml", "source: m.py\ntrain: {steps: 3}\noptimizer: {lr: 5e-4}\n")
    recipe = read_recipe(path, ["train.steps=7", "split.layers=[2, 4]", "data.source=digits", "eval.every=5"])
    assert (recipe.train.steps, recipe.split.layers, recipe.data.source) == (7, (2, 4), "digits")
    assert recipe.optimizer.lr == 5e-4 and recipe.eval.every == 5


@pytest.mark.parametrize(("inside", "override"), [("epochs", "steps"), ("steps", "epochs")])
def test_an_override_of_the_length_displaces_the_other_unit(tmp_path, inside, override):
    path = write(tmp_path / "r.yaml", f"source: m.py\ntrain: {{{inside}: 3}}\n")
    train = read_recipe(path, [f"train.{override}=7"]).train
    assert getattr(train, override) == 7 and getattr(train, inside) is None
    with pytest.raises(UsageError, match="both given"):
        read_recipe(path, ["train.steps=7", "train.epochs=7"])


def test_a_wrong_override_is_blamed_on_the_command_line(tmp_path):
    path = write(tmp_path / "r.yaml", "source: m.py\ntrain: {batch: 3}\n")
    with pytest.raises(UsageError) as caught:
        read_recipe(path, ["train.batch=x"])
    assert caught.value.where == "the command line"


def test_a_recipe_survives_its_own_yaml(tmp_path):
    recipe = Recipe(source="m.py", seed=3)
    assert read_recipe(write(tmp_path / "r.yaml", to_yaml(recipe))) == recipe


def test_records_survive_json_and_keep_their_identity():
    fit = NoiseFit("edm", "x", (0.1, 1.0), 0.05, 0.5, p_mean=-1.2, p_std=1.2)
    again = parse(NoiseFit, to_data(fit), file="x")
    assert again == fit and again.identity == fit.identity
    assert identity(fit) != identity(NoiseFit("edm", "x", (0.1, 2.0), 0.05, 0.5, p_mean=-1.2, p_std=1.2))


def test_a_plan_from_a_newer_version_is_refused():
    with pytest.raises(DBConvertError, match="schema version 99"):
        parse_plan({"schema_version": 99}, file="plan.json")
    with pytest.raises(UsageError, match="missing"):
        parse_plan({"schema_version": 1}, file="plan.json")


@pytest.mark.parametrize(("depth", "blocks"), [(6, 3), (7, 3), (5, 4), (12, 5), (4, 4), (3, 1)])
def test_sizes_differ_by_at_most_one_and_no_layer_is_dropped(depth, blocks):
    pairs = cut(depth, blocks=blocks)
    sizes = [last - first + 1 for first, last in pairs]
    assert len(pairs) == blocks and max(sizes) - min(sizes) <= 1
    assert [layer for first, last in pairs for layer in range(first, last + 1)] == list(range(depth))


def test_impossible_cuts_are_refused():
    for arguments in ({"blocks": 7}, {"blocks": 0}, {"sizes": (2, 3)}, {"sizes": (6, 0)}):
        with pytest.raises(UsageError):
            cut(6, **arguments)
    assert cut(6, sizes=(1, 5)) == ((0, 0), (1, 5))
