"""Networks with several streams are refused for that, and their neighbours with one are not."""

import networks
import pytest
import torch
from torch import nn

from dbconvert.anatomy import Adapter
from dbconvert.errors import Refused
from dbconvert.graph.analysis import analyse
from dbconvert.graph.proof import prove
from tests.acceptance import written

WIDTH, STREAMS = networks.WIDTH, 4


def refusal(model, **wanted):
    with pytest.raises(Refused) as caught:
        analyse(model.eval(), {"x": networks.features()}, **wanted)
    return caught.value


def proved(model, **wanted):
    inputs = {"x": networks.features()}
    anatomy = prove(model.eval(), analyse(model.eval(), inputs, **wanted), inputs)
    assert all(check.passed for check in anatomy.proof)
    return anatomy


class Core(nn.Module):
    """Layers that are called again and again, on one tensor or on the sum of two."""

    def __init__(self):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(networks.Block() for _ in range(2)), nn.LayerNorm(WIDTH)

    def forward(self, x, other=None):
        x = x if other is None else x + other
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class TwoLoops(nn.Module):
    def __init__(self, together):
        super().__init__()
        self.stem, self.head, self.together = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3), together
        self.slow, self.fast = Core(), Core()

    def forward(self, x):
        high = self.stem(x)
        low = torch.zeros_like(high)
        for _ in range(3):
            low, high = self.together(self, low, high)
        return self.head(high.mean(1))


def summed_outside(net, low, high):
    low = net.fast(low + high)
    return low, net.slow(high + low)


def summed_inside(net, low, high):
    low = net.fast(low, high)
    return low, net.slow(high, low)


def one_way(net, low, high):
    """The fast loop never reads what the slow one returned."""
    low = net.fast(low)
    return low, net.slow(high, low)


@pytest.mark.parametrize("together", [summed_outside, summed_inside])
def test_loops_that_feed_each_other(together):
    caught = refusal(TwoLoops(together))
    assert caught.kind == "looped" and "feed each other" in caught.reason and caught.node
    assert "fast (2 layers, called 3 times)" in caught.reason and "slow (2 layers" in caught.reason


def test_loops_that_do_not_feed_each_other():
    inputs = {"x": networks.features()}
    try:
        found = analyse(TwoLoops(one_way).eval(), inputs).verdict
    except Refused as caught:
        found = caught.reason
    assert "feed each other" not in found
    looped = networks.Net(networks.Block)
    looped.layers[2], looped.layers[3] = looped.layers[0], looped.layers[1]
    assert analyse(looped.eval(), inputs).verdict == "looped"


class Hyper(nn.Module):
    """Hyper-connections: one branch for n streams [N, T, n, d]; `carry` is what becomes of the streams themselves."""

    def __init__(self, carry):
        super().__init__()
        self.carry, self.norm = carry, nn.LayerNorm(WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.matrix = nn.Parameter(torch.randn(STREAMS, STREAMS))
        self.read, self.write = nn.Parameter(torch.randn(STREAMS, 1)), nn.Parameter(torch.randn(STREAMS, 1))

    def forward(self, x):
        branch = self.body(self.norm((self.read * x).sum(-2)))
        return self.carry(self, x) + self.write * branch.unsqueeze(-2)


class HyperNet(networks.Net):
    def forward(self, x):
        x = self.stem(x).unsqueeze(2).repeat(1, 1, STREAMS, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.sum(2).mean(1))


MIXINGS = {
    "matrix first": lambda layer, x: layer.matrix.softmax(-1) @ x,
    "matrix last": lambda layer, x: torch.matmul(x.transpose(-1, -2), layer.matrix).transpose(-1, -2),
}


@pytest.mark.parametrize("carry", MIXINGS.values(), ids=MIXINGS)
def test_streams_that_are_mixed(carry):
    net = HyperNet(lambda: Hyper(carry))
    caught = refusal(net)
    assert caught.kind == "several-streams" and "mixed, not added to" in caught.reason
    assert "4 streams, [2, 12, 4, 32]" in caught.reason and "matmul" in caught.node and "layers.0" in caught.node
    anatomy = proved(net, adapter=Adapter(layers=("layers",), enters=(0,), leaves=()))
    assert anatomy.verdict == "accepted" and anatomy.depth == networks.DEPTH


def test_several_streams_that_are_added_to_are_one():
    assert proved(HyperNet(lambda: Hyper(lambda _, x: x))).verdict == "accepted"


def test_a_product_over_tokens_mixes_no_streams():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(networks.LENGTH, networks.LENGTH))
            self.body = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))

        def forward(self, x):
            return self.matrix @ x + self.body(x)

    assert refusal(networks.Net(Mixed)).kind == "not-residual"


class Routed(written.ScaledAndShifted):
    """Hands a second state from layer to layer, as routers that remember do."""

    def __init__(self):
        super().__init__()
        self.route, self.decay = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, state=None):
        x = self.join1(self.attention(self.norm1(x)), x)
        y = self.norm2(x)
        state = self.route(y) if state is None else self.route(y) + state * self.decay
        return self.join2(self.mlp(y) * state.sigmoid(), x), state


class RoutedNet(networks.Net):
    def forward(self, x):
        x, state = self.stem(x), None
        for layer in self.layers:
            x, state = layer(x, state)
        return self.head(x.mean(1))


def test_a_second_state_beside_a_stream_that_modules_scale_and_shift():
    """The sums lie in modules with vectors of their own; without them the second state would be the only stream."""
    caught = refusal(RoutedNet(Routed))
    assert caught.kind == "several-streams" and "made inside layers.0: the layers carry more than" in caught.reason
    assert proved(networks.Net(written.ScaledAndShifted)).verdict == "accepted"


def test_each_branch_of_a_shortcut_has_the_norm_it_reads():
    branches = proved(networks.Net(written.Shortcut)).layers[0].branches
    sites = {branch.gate.module.partition(".")[0]: branch.norm.module for branch in branches}
    assert sites == {"late": "norms.0", "middle": "norms.0", "attention": "norms.1", "last": "norms.2"}
