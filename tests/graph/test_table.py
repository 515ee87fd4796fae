"""The table of networks x properties: what `accepted` means, shown on each."""

import copy
import pickle

import networks
import pytest
import torch

from dbconvert.graph.analysis import analyse, grow_batch
from dbconvert.graph.cut import strip
from dbconvert.graph.inject import eject, inject
from dbconvert.graph.proof import no_fast_paths, prove, shorten
from dbconvert.graph.tape import tensors
from dbconvert.graph.values import item, look_up

ROWS = list(networks.ACCEPTED)
WIDTH = 8


@pytest.fixture(params=ROWS)
def row(request):
    model, inputs = networks.build(request.param)
    with no_fast_paths():
        yield request.param, model, inputs, analyse(model, inputs)


def outputs(model, inputs, train=False):
    model.train(train)
    torch.manual_seed(0)
    with torch.no_grad():
        found = [value for _, value in tensors(model(**inputs))]
    model.eval()
    return found


def condition(inputs):
    return torch.randn(len(next(iter(inputs.values()))), WIDTH)


def random_modulation(model):
    torch.manual_seed(1)
    for parameter in model.dbconvert.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


def converted(model, anatomy, start="original"):
    changed = copy.deepcopy(model)
    return changed, inject(changed, anatomy, blocks=2, width=WIDTH, start=start)


def test_facts(row):
    name, _, _, anatomy = row
    assert anatomy.verdict == "accepted"
    assert (anatomy.depth, anatomy.width, anatomy.streams, anatomy.calls) == (
        networks.DEPTH,
        networks.WIDTH,
        1,
        1,
    )
    assert anatomy.post_norm == (name in networks.POST_NORM)
    assert all(len(layer.branches) == (1 if name in networks.ONE_BRANCH else 2) for layer in anatomy.layers)
    assert anatomy.axes.batch == (1 if name.endswith("seq_first") else 0)
    assert anatomy.layers[0].parameters > 0 and anatomy.stem.parameters + anatomy.readout.parameters > 0


def test_gates_act_along_the_channels(row):
    _, _, _, anatomy = row
    for layer in anatomy.layers:
        assert {branch.gate.features for branch in layer.branches} == {networks.WIDTH}
        assert {branch.norm.features for branch in layer.branches} == {networks.WIDTH}


def test_equals_original_to_the_bit(row):
    _, model, inputs, anatomy = row
    changed, run = converted(model, anatomy)
    cases = {"same": inputs, "batch": grow_batch(inputs), "length": shorten(inputs)}
    for case in filter(None, cases.values()):
        run.condition = condition(case)
        for a, b in zip(outputs(model, case), outputs(changed, case), strict=True):
            assert torch.equal(a, b)


def test_equals_original_in_train_mode(row):
    _, model, inputs, anatomy = row
    changed, run = converted(model, anatomy)
    run.condition = condition(inputs)
    for a, b in zip(outputs(model, inputs, train=True), outputs(changed, inputs, train=True), strict=True):
        assert torch.equal(a, b)


def test_zero_start_is_the_identity(row):
    name, model, inputs, anatomy = row
    if name in networks.POST_NORM:
        with pytest.raises(Exception, match="post-norm"):
            converted(model, anatomy, start="zero")
        return
    changed, run = converted(model, anatomy, start="zero")
    run.condition = condition(inputs)
    seen = []
    for layer in anatomy.layers:

        def compare(_, args, kwargs, out, layer=layer):
            seen.append(torch.equal(look_up(args, kwargs, layer.stream_in), item(out, layer.stream_out)))

        changed.get_submodule(layer.path).register_forward_hook(compare, with_kwargs=True)
    outputs(changed, inputs)
    assert seen == [True] * networks.DEPTH


def test_keys_and_ties_are_kept(row):
    _, model, _, anatomy = row
    changed, _ = converted(model, anatomy)
    before, after = model.state_dict(), changed.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(key.startswith("dbconvert.") for key in set(after) - set(before))
    for first, *others in anatomy.tied:
        assert all(changed.get_parameter(first) is changed.get_parameter(other) for other in others)


def test_modulation_changes_the_output_and_reaches_every_site(row):
    _, model, inputs, anatomy = row
    changed, run = converted(model, anatomy)
    random_modulation(changed)
    run.condition = condition(inputs)
    assert not torch.equal(outputs(model, inputs)[0], outputs(changed, inputs)[0])
    loss = sum(value.square().sum() for _, value in tensors(changed(**inputs)) if value.requires_grad)
    loss.backward()
    for modulation in changed.dbconvert.modulation.values():
        assert bool((modulation.linear.weight.grad.abs().sum(1) > 0).all())


def test_conditions_stay_with_their_example(row):
    """Changing one example's condition leaves the other example's output alone: the batch axis is right."""
    _, model, inputs, anatomy = row
    changed, run = converted(model, anatomy)
    random_modulation(changed)
    run.condition = first = condition(inputs)
    before = outputs(changed, inputs)[0]
    run.condition = torch.stack([first[0], first[1] + 1])
    after = outputs(changed, inputs)[0]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_gradients_stay_in_the_block(row):
    _, model, inputs, anatomy = row
    changed, run = converted(model, anatomy)
    run.active, run.condition = range(1, 3), condition(inputs)
    sum(value.square().sum() for _, value in tensors(changed(**inputs)) if value.requires_grad).backward()
    touched = {name for name, p in changed.named_parameters() if p.grad is not None}
    layers = {anatomy.layer_of(name) for name in touched if not name.startswith("dbconvert.")} - {None}
    modulations = {name.split(".")[2] for name in touched if name.startswith("dbconvert.modulation.")}
    assert layers == {1, 2} and modulations == {"1", "2"}


def test_blocks_chain_to_the_whole_stack(row):
    name, model, inputs, anatomy = row
    names = {check.name: check for check in prove(model, anatomy, inputs).proof}
    assert names["blocks run one after the other equal the whole stack"].passed
    assert len(names) == (3 if anatomy.post_norm else 4) + (name == "functional_norm")


def test_other_layers_can_be_absent(row):
    _, model, inputs, anatomy = row
    changed, run = converted(model, anatomy)
    random_modulation(changed)
    alone = copy.deepcopy(changed)
    strip(alone, anatomy, range(1, 3))
    assert not any(anatomy.layer_of(name) in (0, 3) for name, _ in alone.named_parameters())
    runs = [run, alone.get_submodule(anatomy.layers[1].path).db_run]
    for each in runs:
        each.active, each.condition = range(1, 3), torch.ones(2, WIDTH)
    assert torch.equal(outputs(changed, inputs)[0], outputs(alone, inputs)[0])


def test_pickle_and_deepcopy(row):
    _, model, inputs, anatomy = row
    changed, run = converted(model, anatomy)
    random_modulation(changed)
    run.condition = torch.ones(2, WIDTH)
    expected = outputs(changed, inputs)[0]
    for copied in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        other = copied.get_submodule(anatomy.layers[0].path).db_run
        assert other is not run and other.condition is None
        other.condition = torch.ones(2, WIDTH)
        assert torch.equal(outputs(copied, inputs)[0], expected)


def test_eject_restores_the_original(row):
    _, model, inputs, anatomy = row
    changed, _ = converted(model, anatomy)
    eject(changed)
    assert [type(m) for m in changed.modules()] == [type(m) for m in model.modules()]
    assert list(changed.state_dict()) == list(model.state_dict())
    assert torch.equal(outputs(changed, inputs)[0], outputs(model, inputs)[0])


def test_autocast(row):
    _, model, inputs, anatomy = row
    changed, run = converted(model, anatomy)
    run.condition = condition(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(outputs(model, inputs), outputs(changed, inputs), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
