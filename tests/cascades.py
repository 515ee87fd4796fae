"""Networks in blocks for tests of what blocks hear of each other, of any task, and what reaches their layers."""

from types import SimpleNamespace

import torch

from dbconvert.engine.convert import converted
from dbconvert.engine.decide import decide
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.opening import Example, Opened
from dbconvert.graph.analysis import analyse
from dbconvert.plan import NoiseRule, SourceRef, cut
from dbconvert.recipe import SplitOptions


def blockwise(model, inputs, task, blocks=3, **options):
    """(network in blocks with random conditioning, its noise intervals)."""
    return in_blocks(model, inputs, analyse(model.eval(), inputs), task, blocks, **options)


def in_blocks(model, inputs, anatomy, task, blocks=2, **options):
    """The same of a network that was analysed."""
    ref = SourceRef("model_file", "build_model", "", (), "")
    opened = Opened(SimpleNamespace(ref=ref), model, inputs, None, 0, anatomy, Example(model, anatomy))
    options = SplitOptions(start="original", **options)
    plan, fit = decide(opened, options, NoiseRule(), task, cut(anatomy.depth, blocks=blocks))
    made = task(anatomy, plan.target, plan.noise)
    run = converted(model, plan, made)
    network = BlockwiseNetwork(model, run, made, plan, tuple(range(blocks)), "shared").eval()
    network.sigma_data = fit.sigma_data
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.conditioning.named_parameters():
            if name.startswith(("modulation", "readout", "context")):
                loudness = 0.5 if name.startswith("context") else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * loudness)
    return network, fit.intervals()


class Entered:
    """Records what enters the layers of every block, while it is open: block, stream, conditioning, and
    the state of a loop."""

    def __init__(self, network):
        self.network, self.seen = network, []

    def __enter__(self):
        network, plain = self.network, self.network.call

        def call(block, passage):
            run = network.run
            entry = run.entry or (lambda stream: stream)

            def enter(stream):
                changed = entry(stream)
                if run.active:
                    state = None if run.loop is None else run.loop.state
                    self.seen.append((block, changed.detach().clone(), run.condition, state))
                return changed

            run.entry = enter
            return plain(block, passage)

        network.call = call
        return self

    def __exit__(self, *_):
        del self.network.call


def same(one, other):
    """Whether two records of a block are the same bits."""
    return all(
        (a is None and b is None) or (a is not None and torch.equal(a, b)) for a, b in zip(one, other, strict=True)
    )
