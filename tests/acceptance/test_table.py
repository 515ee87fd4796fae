"""The table of networks x properties: what `accepted` means, shown on each."""

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from dbconvert.anatomy import Anatomy
from dbconvert.errors import Refused
from dbconvert.graph.analysis import analyse, grow_batch
from dbconvert.graph.cut import strip
from dbconvert.graph.inject import eject, inject
from dbconvert.graph.proof import prove, shorten
from dbconvert.graph.stability import function_sites
from dbconvert.graph.tape import tensors
from dbconvert.graph.untouched import no_fast_paths
from dbconvert.graph.values import item, look_up
from tests.acceptance.rows import Row
from tests.acceptance.table import CONVERTED, REFUSED

WIDTH = 8


@dataclass
class Case:
    """A row, built and analysed once for all its tests, which work on copies of the network."""

    row: Row
    model: nn.Module
    inputs: dict[str, Any]
    anatomy: Anatomy

    def converted(self, start="original"):
        changed = copy.deepcopy(self.model)
        return changed, inject(changed, self.anatomy, blocks=2, width=WIDTH, start=start)

    @property
    def block(self):
        """Some layers, but not all where there are several."""
        depth = self.anatomy.depth
        first = min(1, depth - 1)
        return range(first, max(first + 1, depth - 1))


@pytest.fixture(scope="module", params=CONVERTED)
def case(request):
    row = CONVERTED[request.param]
    model, inputs = row.build()
    with no_fast_paths():
        yield Case(row, model, inputs, analyse(model, inputs, stack=row.stack))


def outputs(model, inputs, train=False):
    model.train(train)
    torch.manual_seed(0)
    with torch.no_grad():
        found = [value for _, value in tensors(model(**inputs))]
    model.eval()
    return found


def condition(inputs):
    return torch.randn(len(next(iter(inputs.values()))), WIDTH)


def run_of(model):
    """The handle that steers a converted network."""
    return next(module.db_run for module in model.modules() if "db_run" in vars(module))


def random_modulation(model):
    torch.manual_seed(1)
    for parameter in model.dbconvert.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


def backward(model, inputs):
    sum(value.square().sum() for _, value in tensors(model(**inputs)) if value.requires_grad).backward()


# -- what is found ----------------------------------------------------------------------------------------------


def test_facts(case):
    row, anatomy = case.row, case.anatomy
    assert anatomy.verdict == row.verdict and anatomy.post_norm == row.post
    assert row.layers in (None, anatomy.depth) and row.width in (None, anatomy.width)
    assert row.branches is None or all(len(layer.branches) == row.branches for layer in anatomy.layers)
    assert (anatomy.streams, anatomy.calls > 1) == (row.streams, row.verdict == "looped")
    assert anatomy.axes.batch == row.batch
    assert anatomy.layers[0].parameters > 0 and anatomy.stem.parameters + anatomy.readout.parameters > 0


def test_gates_act_along_the_channels(case):
    for layer in case.anatomy.layers:
        assert {branch.gate.features for branch in layer.branches} <= {case.anatomy.width}
        assert {branch.norm.features for branch in layer.branches} <= {case.anatomy.width}


def test_networks_with_a_condition_of_their_own_get_no_sites(case):
    found = any(layer.branches for layer in case.anatomy.layers)
    assert found != case.row.conditioned


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    row = REFUSED[name]
    model, inputs = row.build()
    with pytest.raises(Refused) as caught:
        prove(model, analyse(model, inputs, stack=row.stack), inputs)
    assert caught.value.reason and row.node in caught.value.node + caught.value.reason
    assert row.kind in (None, caught.value.kind)


# -- what is the same -------------------------------------------------------------------------------------------


def test_equals_original_to_the_bit(case):
    changed, run = case.converted()
    cases = {"same": case.inputs, "batch": grow_batch(case.inputs), "length": shorten(case.inputs)}
    for inputs in filter(None, cases.values()):
        run.condition = condition(inputs)
        for a, b in zip(outputs(case.model, inputs), outputs(changed, inputs), strict=True):
            assert torch.equal(a, b)


def test_equals_original_in_train_mode(case):
    changed, run = case.converted()
    run.condition = condition(case.inputs)
    original = copy.deepcopy(case.model)
    for a, b in zip(outputs(original, case.inputs, train=True), outputs(changed, case.inputs, train=True), strict=True):
        assert torch.equal(a, b)


def test_zero_start_is_the_identity(case):
    if case.row.conditioned:
        pytest.skip("the layers have a modulation of their own")
    if case.row.post:
        with pytest.raises(Refused, match="post-norm"):
            case.converted(start="zero")
        return
    changed, run = case.converted(start="zero")
    run.condition = condition(case.inputs)
    if case.anatomy.layers[0].around is not None:
        entered = []
        run.entry, run.keep = lambda stream: entered.append(stream) or stream, True
        outputs(changed, case.inputs)
        assert torch.equal(entered[0], run.leaving)
        return
    seen = []
    for layer in case.anatomy.layers:

        def compare(_, args, kwargs, out, layer=layer):
            seen.append(torch.equal(look_up(args, kwargs, layer.stream_in), item(out, layer.stream_out)))

        changed.get_submodule(layer.path).register_forward_hook(compare, with_kwargs=True)
    outputs(changed, case.inputs)
    assert seen == [True] * case.anatomy.depth * case.anatomy.calls


def test_keys_and_ties_are_kept(case):
    changed, _ = case.converted()
    before, after = case.model.state_dict(), changed.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(key.startswith("dbconvert.") for key in set(after) - set(before))
    for first, *others in case.anatomy.tied:
        assert all(changed.get_parameter(first) is changed.get_parameter(other) for other in others)


def test_the_proof_passes(case):
    names = {check.name: check for check in prove(case.model, case.anatomy, case.inputs).proof}
    assert names["blocks run one after the other equal the whole stack"].passed
    functional = any(True for _ in function_sites(case.anatomy))
    assert case.row.conditioned or len(names) == (3 if case.anatomy.post_norm else 4) + functional


def test_eject_restores_the_original(case):
    changed, _ = case.converted()
    eject(changed)
    assert [type(m) for m in changed.modules()] == [type(m) for m in case.model.modules()]
    assert list(changed.state_dict()) == list(case.model.state_dict())
    assert torch.equal(outputs(changed, case.inputs)[0], outputs(case.model, case.inputs)[0])


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of norms of queries and keys
def test_autocast(case):
    changed, run = case.converted()
    run.condition = condition(case.inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(outputs(case.model, case.inputs), outputs(changed, case.inputs), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


# -- what conditioning does -------------------------------------------------------------------------------------


def test_modulation_changes_the_output_and_reaches_every_site(case):
    if case.row.conditioned:
        pytest.skip("the layers have a modulation of their own")
    changed, run = case.converted()
    random_modulation(changed)
    run.condition = condition(case.inputs)
    assert not torch.equal(outputs(case.model, case.inputs)[0], outputs(changed, case.inputs)[0])
    backward(changed, case.inputs)
    for modulation in changed.dbconvert.modulation.values():
        assert bool((modulation.linear.weight.grad.abs().sum(1) > 0).all())


def test_conditions_stay_with_their_example(case):
    """Changing one example's condition leaves the other example's output alone: the batch axis is right."""
    if case.row.conditioned:
        pytest.skip("the layers have a modulation of their own")
    changed, run = case.converted()
    random_modulation(changed)
    run.condition = first = condition(case.inputs)
    before = outputs(changed, case.inputs)[0]
    run.condition = torch.stack([first[0], first[1] + 1])
    after = outputs(changed, case.inputs)[0]
    same = torch.allclose(before[0], after[0], atol=1e-5) if case.row.mixes else torch.equal(before[0], after[0])
    assert same and not torch.equal(before[1], after[1])


# -- one block alone --------------------------------------------------------------------------------------------


def test_gradients_stay_in_the_block(case):
    changed, run = case.converted()
    run.active, run.condition = case.block, condition(case.inputs)
    backward(changed, case.inputs)
    touched = {name for name, p in changed.named_parameters() if p.grad is not None}
    layers = {case.anatomy.layer_of(name) for name in touched if not name.startswith("dbconvert.")} - {None}
    modulations = {int(name.split(".")[2]) for name in touched if name.startswith("dbconvert.modulation.")}
    assert layers == set(case.block) and modulations == (set() if case.row.conditioned else layers)


def test_other_layers_can_be_absent(case):
    changed, run = case.converted()
    random_modulation(changed)
    alone = copy.deepcopy(changed)
    strip(alone, case.anatomy, case.block)
    owned = {case.anatomy.layer_of(name) for name, _ in alone.named_parameters()} - {None}
    assert owned == set(case.block)
    runs = [run, run_of(alone)]
    for each in runs:
        each.active, each.condition = case.block, torch.ones(2, WIDTH)
    assert torch.equal(outputs(changed, case.inputs)[0], outputs(alone, case.inputs)[0])


def test_pickle_and_deepcopy(case):
    changed, run = case.converted()
    random_modulation(changed)
    run.condition = torch.ones(2, WIDTH)
    expected = outputs(changed, case.inputs)[0]
    for copied in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        other = run_of(copied)
        assert other is not run and other.condition is None
        other.condition = torch.ones(2, WIDTH)
        assert torch.equal(outputs(copied, case.inputs)[0], expected)
