"""LoRA (Hu et al. 2021, arXiv 2106.09685), through peft: low-rank additions to the layers' weights learn, nothing else.

Every linear module of every layer gets them, of rank 8, scaled by 1, as peft has it by default. Once trained they are
added to the weights, so that what is written is the network that was given.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from dbconvert.data.batches import derive
from dbconvert.engine.method import Method, Trained
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.errors import UsageError
from dbconvert.plan import Plan
from dbconvert.recipe import Recipe
from dbconvert.sources.transformers_config import linear_kinds

RANK = 8
MARK = "lora_"
"""In the names of what learns."""


class LoRA(Method):
    """All layers of a pretrained network run; what is added to them learns."""

    name = "lora"
    alone = True

    def refuse(self, plan: Plan, recipe: Recipe) -> None:
        if not plan.pretrained:
            raise UsageError(
                "train.method=lora adds to a pretrained network, and this one starts from scratch",
                hint="give weights=FILE, or use train.method=end-to-end",
            )
        peft()

    def trained(self, network: BlockwiseNetwork, recipe: Recipe, steps: int) -> Trained:
        add(network, recipe.seed)
        return super().trained(network, recipe, steps)

    def parameters(self, network: BlockwiseNetwork) -> dict[str, nn.Parameter]:
        return {key: p for key, p in super().parameters(network).items() if MARK in key}

    def finish(self, network: BlockwiseNetwork) -> None:
        merge(network.model)


def peft() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft as found
    except ImportError:
        raise UsageError(
            "train.method=lora needs peft, which is not installed", hint="pip install 'dbconvert[lora]'"
        ) from None
    return found


def add(network: BlockwiseNetwork, seed: int) -> None:
    """Puts low-rank additions, zero at first, around the linear modules of the layers.

    Raises:
        UsageError: there are none.
    """
    anatomy, found = network.plan.anatomy, peft()
    kinds = linear_kinds()
    names = [n for n, m in network.model.named_modules() if isinstance(m, kinds) and anatomy.layer_of(n) is not None]
    if not names:
        raise UsageError(
            "train.method=lora adds to linear modules, and the layers have none", hint="use train.method=end-to-end"
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(derive(seed, "lora"))
        found.inject_adapter_in_model(found.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), network.model)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds what was learnt to the weights, and puts the modules back that were there before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
