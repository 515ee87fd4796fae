"""The forms of training, by the name that a recipe gives them."""

from __future__ import annotations

from dbconvert.engine.baselines import EndToEnd, Shallow, TruncatedBPTT
from dbconvert.engine.block_training import Blocks
from dbconvert.engine.forward_forward import ForwardForward
from dbconvert.engine.layerwise import LISA, BAdam
from dbconvert.engine.lora import LoRA
from dbconvert.engine.method import Method
from dbconvert.engine.noprop import NoPropDT

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Blocks(),
        EndToEnd(),
        Shallow(),
        TruncatedBPTT(),
        ForwardForward(),
        NoPropDT(),
        BAdam(),
        LISA(),
        LoRA(),
    )
}
