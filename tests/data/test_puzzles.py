"""The built-in puzzles: right answers, the same example whoever asks, and what their options may be."""

from itertools import permutations

import pytest
import taggers
import torch

from dbconvert.data.datasets import open_part
from dbconvert.data.examples import IGNORED, LABEL
from dbconvert.data.puzzles import PARTS, PUZZLES
from dbconvert.data.tagged import Tagged
from dbconvert.data_options import DataOptions
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.graph.analysis import analyse
from dbconvert.plan import Target
from dbconvert.schema import parse

NAMES = list(PUZZLES)


def part(source, name="train", **puzzle):
    return open_part(parse(DataOptions, {"source": source, "puzzle": puzzle or None}, file="a test"), name)


# -- answers ----------------------------------------------------------------------------------------------------


def test_products_of_permutations_of_three_things():
    elements, puzzle = list(permutations("abc")), part("s3", size=7)
    for example in (puzzle[3], puzzle[199_999]):
        arranged = {"a": "a", "b": "b", "c": "c"}  # what the product so far makes of each thing
        for token, label in zip(example["tokens"].tolist(), example["label"].tolist(), strict=True):
            arranged = {x: arranged[y] for x, y in zip("abc", elements[token], strict=True)}
            assert "".join(arranged.values()) == "".join(elements[label])
    assert puzzle.depths([0]).tolist() == [[1, 2, 3, 4, 5, 6, 7]]


def test_powers_of_a_permutation():
    puzzle = part("permutation-powers", size=5, steps=3)
    found = puzzle.__getitems__(list(range(50)))
    assert len({tuple(row.tolist()) for row in found["tokens"]}) > 40
    for f, labels in zip(found["tokens"].tolist(), found["label"].tolist(), strict=True):
        assert sorted(f) == list(range(5)) and labels == [[f[i], f[f[i]], f[f[f[i]]]] for i in range(5)]
    assert puzzle.depths([0])[0].tolist() == [[1, 2, 3]] * 5 and puzzle.labels == 3
    highest = part("permutation-powers", size=5, steps=3, single=True)
    assert highest.labels == 1 and torch.equal(highest.__getitems__([4, 7])["label"], found["label"][[4, 7], :, 2])
    assert highest.depths([0]).tolist() == [[3] * 5]


def after(cells, steps):
    """Rule 110 as a table of neighbourhoods."""
    rule = {"111": 0, "110": 1, "101": 1, "100": 0, "011": 1, "010": 1, "001": 1, "000": 0}
    for _ in range(steps):
        n = len(cells)
        cells = [rule[f"{cells[i - 1]}{cells[i]}{cells[(i + 1) % n]}"] for i in range(n)]
    return cells


def test_steps_of_an_automaton():
    fixed = part("automaton", size=9).__getitems__(list(range(20)))
    for tokens, labels in zip(fixed["tokens"].tolist(), fixed["label"].tolist(), strict=True):
        assert labels == after(tokens, 4)
    mixed = part("automaton", size=9, steps=[1, 6])
    found, told = mixed.__getitems__(list(range(200))), set()
    for tokens, labels, depth in zip(*found.values(), mixed.depths(list(range(200))), strict=True):
        steps = {int(token) // 2 for token in tokens}
        assert labels.tolist() == after((tokens % 2).tolist(), 1 + steps.copy().pop()) and len(steps) == 1
        assert depth.tolist() == [1 + steps.copy().pop()] * 9
        told |= steps
    assert told == set(range(6)) and mixed.vocabulary == 12


@pytest.mark.parametrize(("name", "count"), [("s3", 1), ("automaton", 1)])
def test_a_single_answer_is_the_deepest(name, count):
    every, single = part(name), part(name, single=True)
    labels, asked = every.__getitems__([5, 6])["label"], single.__getitems__([5, 6])["label"]
    there = asked != IGNORED
    assert there.sum(1).tolist() == [count, count] and torch.equal(labels[there], asked[there])
    depths = every.depths([5, 6])
    assert (depths[there] == depths.max()).all()


# -- examples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_function_of_its_number(name):
    train, again = part(name), part(name)
    together = train.__getitems__([7, 199_999, 0])
    for row, index in enumerate([7, 199_999, 0]):
        assert all(torch.equal(again[index][key], together[key][row]) for key in together)
    assert len(part(name, examples=50)) == 50 and len(part(name, "test", examples=50)) == 2_000
    assert {each: len(part(name, each)) for each in PARTS} == PARTS
    first = list(range(300))
    heads, others = (
        {tuple(row.tolist()) for row in p.__getitems__(first)["tokens"]} for p in (train, part(name, "test"))
    )
    assert len(heads) == len(others) == 300 and not heads & others


def test_draws_are_even():
    counts = part("s3").__getitems__(list(range(4000)))["tokens"].flatten().bincount(minlength=6)
    assert (counts / counts.sum() - 1 / 6).abs().max() < 0.005
    points = part("permutation-powers", size=4, steps=1).__getitems__(list(range(4800)))["tokens"]
    kinds = (points * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(kinds) == 24 and kinds.min() > 140 and kinds.max() < 260


@pytest.mark.parametrize(
    ("source", "puzzle", "message"),
    [
        ("s3", {"steps": 3}, "data.puzzle.steps is nothing for s3"),
        ("permutation-powers", {"steps": [1, 4]}, "data.puzzle.steps is nothing for permutation-powers"),
        ("permutation-powers", {"size": 1}, "data.puzzle.size is nothing for permutation-powers"),
        ("automaton", {"steps": [6, 1]}, "data.puzzle.steps is nothing for automaton"),
        ("automaton", {"size": 2}, "data.puzzle.size is nothing for automaton"),
        ("automaton", {"steps": 0}, "puzzle.steps"),
        ("s3", {"length": 3}, "unknown key puzzle.length"),
        ("digits", {"size": 3}, "data.puzzle is for s3, permutation-powers, automaton, and the source is digits"),
    ],
)
def test_options_that_mean_nothing_are_refused(source, puzzle, message):
    with pytest.raises(UsageError, match=message):
        part(source, **puzzle)


def test_unknown_parts_are_refused():
    with pytest.raises(UsageError, match="s3 has no part dev"):
        part("s3", "dev")


# -- as a network takes them ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def anatomy():
    return analyse(*taggers.build("tagger"))


def tagged(rows, anatomy, classes=5, labels=1):
    return Tagged(rows, DataOptions(source="rows"), anatomy, Target(classes, 8, "positions", labels=labels))


def row(tokens, labels):
    return {"ids": tokens, "label": labels}


def test_batches_hold_arguments_and_labels(anatomy):
    data = tagged([row([1, 2, 3], [0, IGNORED, 4]), row([4, 5, 6], [4, 4, 1])], anatomy)
    batch = data.__getitems__([1, 0])
    assert batch["ids"].tolist() == [[4, 5, 6], [1, 2, 3]] and batch[LABEL].tolist() == [[4, 4, 1], [0, IGNORED, 4]]
    assert data.label_counts().tolist() == [1, 1, 0, 0, 3] and len(data) == 2
    puzzle = tagged(part("s3"), anatomy, 6)
    assert puzzle.__getitems__([2])[LABEL].shape == (1, 12) and puzzle.label_counts().min() > 7000


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data source rows is empty"),
        ([{"ids": [1]}], "no column label"),
        ([row([1, 2], [0, 5])], "example 0 has label 5, and the network has 5 classes"),
        ([row([1, 2], [0, -1])], "example 0 has label -1"),
        ([row([1, 2], 3)], "the label of example 0 is no row of whole numbers"),
        ([row([1, 2], [0.5, 1.0])], "the label of example 0 is no row of whole numbers"),
        ([row([1, 2], ["a", "b"])], "label of example 0 is a list, not numbers"),
        ([row([[1], [2]], [0, 1])], r"column ids has shape \[2, 1\] an example, and the split saw ids \[2, 12\]"),
        ([row([1, 2], [0, 1]), row([1, 2, 3], [0, 1, 2])], r"example 1 has ids \[3\], and example 0 has \[2\]"),
        ([row([1, 2], [IGNORED, IGNORED])], "no position of the data has a label"),
    ],
)
def test_unfit_data_is_refused(rows, message, anatomy):
    with pytest.raises(DBConvertError, match=message):
        data = tagged(rows, anatomy)
        data.__getitems__(list(range(len(rows))))
        data.label_counts()


def test_a_network_with_too_few_classes_is_refused(anatomy):
    with pytest.raises(DBConvertError, match="s3 has 6 tokens and 6 classes, and the network 61 and 5"):
        tagged(part("s3"), anatomy)


# -- several labels a position ----------------------------------------------------------------------------------


def test_labels_of_a_position_are_counted_apart(anatomy):
    rows = [row([1, 2, 3], [[0, 4], [IGNORED, IGNORED], [1, 4]]), row([4, 5, 6], [[1, 2], [1, 2], [0, 0]])]
    data = tagged(rows, anatomy, labels=2)
    assert data.__getitems__([1, 0])[LABEL].shape == (2, 3, 2)
    assert data.label_counts().tolist() == [[2, 3, 0, 0, 0], [1, 0, 2, 0, 2]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"the label of example 0 is no table of whole numbers, \[S, 2\]"),
        ([[0, 1, 2], [0, 1, 2]], r"the label of example 0 is no table of whole numbers, \[S, 2\]"),
        ([[0, 1], [0, 7]], "example 0 has label 7, and the network has 5 classes"),
        ([[0, 1], [IGNORED, 1]], "example 0 has a position that lacks some of its 2 labels"),
    ],
)
def test_unfit_labels_of_several_are_refused(labels, message, anatomy):
    with pytest.raises(DBConvertError, match=message):
        tagged([row([1, 2], labels)], anatomy, labels=2)


def test_a_network_of_another_number_of_labels_is_refused(anatomy):
    powers = part("permutation-powers", size=5, steps=3)
    with pytest.raises(DBConvertError, match="permutation-powers asks 3 of every position, and the network tells 1"):
        tagged(powers, anatomy)
    assert tagged(powers, anatomy, labels=3).label_counts().sum(1).tolist() == [4096 * 5] * 3
