"""Converted networks of tokens for tests, without a package on disk."""

from types import SimpleNamespace

import torch

from dbconvert.engine.convert import converted
from dbconvert.engine.decide import decide
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.opening import Example, Opened
from dbconvert.graph.analysis import analyse
from dbconvert.graph.oracle import is_causal, outspoken
from dbconvert.plan import NoiseRule, SourceRef, cut
from dbconvert.recipe import SplitOptions
from dbconvert.tasks.causal_lm import CausalLM


def loud(model):
    """The same network, its layers as loud as their stream and the head awake, so that mistakes show."""
    anatomy = analyse(*model)
    network = outspoken(model[0], anatomy)
    with torch.no_grad():
        head = network.get_submodule(anatomy.head.module)
        if not head.weight.any():
            head.weight.normal_()
    return network, model[1]


def causal_network(row, blocks=2, table=None, context="raw"):
    """(network in blocks with random conditioning, its noise intervals) of an acceptance row."""
    model, inputs = loud(row.build())
    return in_blocks(model, analyse(model, inputs, stack=row.stack), CausalLM, blocks, table, context)


def in_blocks(model, anatomy, kind, blocks=2, table=None, context="raw"):
    """The same of any network and task."""
    ref = SourceRef("model_file", "build_model", "", (), "")
    opened = Opened(SimpleNamespace(ref=ref), model, {}, None, 0, anatomy, Example(model, anatomy))
    options = SplitOptions(start="original", table=table, context=context)
    plan, fit = decide(opened, options, NoiseRule(), kind, cut(anatomy.depth, blocks=blocks))
    task = kind(anatomy, plan.target)
    run = converted(model, plan, task)
    network = BlockwiseNetwork(model, run, task, plan, tuple(range(blocks)), "shared").eval()
    network.sigma_data = fit.sigma_data
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.conditioning.named_parameters():
            if name.startswith(("modulation", "readout", "context")):
                loudness = 0.5 if name.startswith("context") else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * loudness)
    return network, fit.intervals()


__all__ = ["causal_network", "in_blocks", "is_causal", "loud"]
