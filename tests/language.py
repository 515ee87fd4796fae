"""Converted networks of tokens for tests, without a package on disk."""

import copy

import torch
from cascades import in_blocks

from dbconvert.graph.analysis import analyse
from dbconvert.graph.oracle import is_causal, outspoken
from dbconvert.tasks.causal_lm import CausalLM


def loud(model):
    """The same network, its layers as loud as their stream and the head awake, so that mistakes show."""
    anatomy = analyse(*model)
    network = copy.deepcopy(model[0]).eval()
    with outspoken(network, anatomy):
        weights = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(weights)
    with torch.no_grad():
        head = network.get_submodule(anatomy.head.module)
        if not head.weight.any():
            head.weight.normal_()
    return network, model[1]


def causal_network(row, blocks=2, table=None, context="raw"):
    """(network in blocks with random conditioning, its noise intervals) of an acceptance row."""
    model, inputs = loud(row.build())
    anatomy = analyse(model, inputs, stack=row.stack)
    return in_blocks(model, {}, anatomy, CausalLM, blocks, table=table, context=context)


__all__ = ["causal_network", "is_causal", "loud"]
