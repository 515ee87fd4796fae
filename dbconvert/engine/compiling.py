"""torch.compile, a layer at a time: layers of equal structure share what was compiled of the first."""

from __future__ import annotations

import shutil

import torch

from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.errors import UsageError

BACKEND = "inductor"
DEVICES = ("cpu", "cuda", "xpu")
"""Those that inductor makes kernels for."""
CAPABILITY = (7, 0)
"""Of CUDA devices, for Triton's kernels."""


def refuse_uncompiled(wanted: str, device: torch.device) -> None:
    """Raises UsageError where torch.compile, which `wanted` runs through, makes no kernels."""
    why = None
    if device.type not in DEVICES:
        why = f"torch.compile makes kernels for {', '.join(DEVICES)}"
    elif device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        why = "torch.compile makes kernels for the CPU with a C++ compiler, and none is installed"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        why = "torch.compile makes kernels for CUDA devices of compute capability 7.0 and above"
    if why is not None:
        raise UsageError(f"{wanted} does not run on {device.type}", why=why, hint="leave it out, or use another device")


def compile_layers(network: BlockwiseNetwork) -> None:
    """From now on layers run compiled; what steers them stays outside. Kernels are made when they first run."""
    torch._dynamo.reset()  # others of this process count towards the most that one piece of code is compiled
    for layer in (layer for block in network.present for layer in network.plan.layers_of(block)):
        facts = network.plan.anatomy.layers[layer]
        for path in [part.path for part in facts.around.parts] if facts.around else [facts.path]:
            network.model.get_submodule(path).compile(backend=BACKEND)


def compiled_graphs() -> int:
    """How many graphs this process has compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
