"""What a user says of the layers, where the graph shows no stack."""

import networks
import pytest
import torch
from torch import nn

from dbconvert.anatomy import Adapter
from dbconvert.engine.opening import inspect
from dbconvert.errors import DBConvertError, Refused
from dbconvert.graph.analysis import analyse
from dbconvert.graph.inject import inject
from dbconvert.graph.proof import prove
from dbconvert.shipped import shipped

EXAMPLE = shipped("examples/highway.py")


class Mixing(nn.Module):
    """Takes its stream by keyword and hands it on in a dict."""

    def __init__(self):
        super().__init__()
        self.change, self.share = nn.Linear(networks.WIDTH, networks.WIDTH), nn.Linear(networks.WIDTH, networks.WIDTH)

    def forward(self, scale, *, hidden):
        share = torch.sigmoid(self.share(hidden)) * scale
        return {"hidden": share * self.change(hidden) + (1 - share) * hidden, "share": share}


class MixingNet(networks.Net):
    def __init__(self):
        super().__init__(Mixing)

    def forward(self, x):
        x, scale = self.stem(x), torch.ones(1)
        for layer in self.layers:
            x = layer(scale, hidden=x)["hidden"]
        return self.head(x.mean(1))


ANSWERS = Adapter(layers=("layers",), enters=("hidden",), leaves=("hidden",))


def build(layer=None):
    torch.manual_seed(0)
    model = MixingNet() if layer is None else networks.Net(layer)
    return model.eval(), {"x": networks.features()}


def test_the_worked_example_converts_and_is_refused_without_its_adapter(tmp_path):
    anatomy = inspect(str(EXAMPLE))
    assert anatomy.depth == 6 and len(anatomy.proof) == 4 and all(check.passed for check in anatomy.proof)
    assert {branch.placement for layer in anatomy.layers for branch in layer.branches} == {"layer"}
    bare = tmp_path / "bare.py"
    bare.write_text(EXAMPLE.read_text().partition("def adapter")[0])
    with pytest.raises(Refused, match="adapter"):
        inspect(str(bare))


def test_a_whole_layer_is_conditioned():
    model, inputs = build()
    anatomy = prove(model, analyse(model, inputs, adapter=ANSWERS), inputs)
    assert anatomy.depth == networks.DEPTH and "conditioned as a whole" in anatomy.notes[0]
    with torch.no_grad():
        before = model(**inputs)
        run = inject(model, anatomy, blocks=2, width=8, start="zero")
        run.condition = torch.randn(2, 8)
        still = model.head(model.stem(inputs["x"]).mean(1))
        assert torch.equal(model(**inputs), still) and not torch.equal(before, still)


def test_residual_layers_keep_their_branches():
    model, inputs = build(networks.Block)
    anatomy = analyse(model, inputs, adapter=Adapter(layers=("layers.1", "layers.0", "layers.2")))
    assert anatomy.layer_paths() == ("layers.0", "layers.1", "layers.2")
    assert [branch.placement for branch in anatomy.layers[0].branches] == ["pre", "pre"]


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (Adapter(layers=("nowhere",)), "no module nowhere"),
        (Adapter(layers=("layers.0",)), "names 1 layers"),
        (Adapter(layers=("layers",), enters=(5,)), "no tensor argument"),
        (Adapter(layers=("layers",), leaves=("other",)), "no tensor output"),
        (Adapter(layers=("layers.0", "layers.2")), "changed before it enters layers.2"),
        (Adapter(layers=("stem", "head")), "dimensions change: stem"),
    ],
)
def test_wrong_answers_are_told(answers, told):
    model, inputs = build(networks.Block)
    with pytest.raises(Refused, match=told):
        analyse(model, inputs, adapter=answers)


def test_an_adapter_of_another_type_is_told(tmp_path):
    file = tmp_path / "odd.py"
    file.write_text(EXAMPLE.read_text().partition("def adapter")[0] + "def adapter():\n    return ['layers']\n")
    with pytest.raises(DBConvertError, match=r"not a dbconvert\.Adapter"):
        inspect(str(file))
