"""A network with only one block's layers in memory: the others keep their place and hand the stream on."""

from __future__ import annotations

from torch import nn

from dbconvert.anatomy import Anatomy
from dbconvert.graph.inject import PREFIX, LayerModule


def strip(model: nn.Module, anatomy: Anatomy, keep: range) -> None:
    """Removes parameters, buffers and children of all layers outside `keep` from a converted network.

    The layers' plain attributes stay, since a network's forward may read them. Their modulations go too.

    Requires: `inject` was called. Ensures: only kept layers own parameters; a stripped layer must not be active.
    """
    modulations = getattr(model, PREFIX).modulation
    for index, layer in enumerate(anatomy.layers):
        if index in keep:
            continue
        module = model.get_submodule(layer.path)
        if not isinstance(module, LayerModule):
            raise TypeError(f"{layer.path} is not converted")
        module._modules.clear()
        module._parameters.clear()
        module._buffers.clear()
        module.db_sites, module.db_modulation = [], ()  # type: ignore[assignment]
        del modulations[str(index)]
