"""A network with only one block's layers in memory: the others keep their place and hand the stream on."""

from __future__ import annotations

from torch import nn

from dbconvert.anatomy import Anatomy
from dbconvert.graph.inject import PREFIX, LayerModule
from dbconvert.graph.joined import PartModule
from dbconvert.graph.parts import lies_in


def strip(model: nn.Module, anatomy: Anatomy, keep: range) -> None:
    """Removes the parameters and buffers of all layers outside `keep` from a converted network, and their modulations.

    Parts of layers that the rest of the network uses too keep theirs.

    The layers' modules and plain attributes stay, since a network's forward may read them (nn.TransformerEncoder
    asks its first layer's attention for its layout).

    Requires: `inject` was called. Ensures: only kept layers own parameters; a stripped layer must not be active.
    """
    modulations = getattr(model, PREFIX).modulation
    for index, layer in enumerate(anatomy.layers):
        if index in keep:
            continue
        module = model.get_submodule(layer.path)
        handles = {m.db_layer_sites for m in module.modules() if isinstance(m, LayerModule | PartModule)}
        if not handles:
            raise TypeError(f"{layer.path} is not converted")
        for name, part in module.named_modules(prefix=layer.path):
            if not lies_in(name, anatomy.outside):
                for tensors in (part._parameters, part._buffers):
                    tensors.update(dict.fromkeys(tensors))
        for handle in handles:
            handle.clear()
        if str(index) in modulations:
            del modulations[str(index)]
