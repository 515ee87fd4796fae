"""Building converted networks from a plan and its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dbconvert.conditioning.embedding import NoiseEmbedding
from dbconvert.conditioning.hearing import Hearing
from dbconvert.engine.listening import CONTEXT
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.periphery import OWN, check_keys
from dbconvert.engine.stores import Store
from dbconvert.errors import DBConvertError
from dbconvert.graph.cut import strip
from dbconvert.graph.fake import empty_weights, is_empty
from dbconvert.graph.inject import PREFIX, inject
from dbconvert.graph.loop import control
from dbconvert.graph.run import Run
from dbconvert.plan import Plan
from dbconvert.sources.base import Source
from dbconvert.tasks.base import Task
from dbconvert.tasks.registry import named, reasons


def task_of(plan: Plan, name: str | None = None) -> Task:
    """The plan's task.

    Raises:
        DBConvertError: none was decided.
    """
    chosen = plan.task or name
    if chosen is None or plan.target is None:
        raise DBConvertError(
            "no task was decided for this network",
            why=reasons(plan.anatomy),
            hint="split it again with --task NAME",
        )
    return named(chosen)(plan.anatomy, plan.target, plan.noise)


def converted(model: nn.Module, plan: Plan, task: Task | None, *, seed: int = 0) -> Run:
    """Injects what the plan says into a fresh network; `seed` is that of new parameters.

    Conditioning is on the meta device where the network is; what a task registers, small tables, is not.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with empty_weights() if is_empty(model) else nullcontext():
            count, width = len(plan.blocks), plan.condition_width
            run = inject(model, plan.anatomy, blocks=count, width=width, start=plan.start, curve=plan.modulation)
        if plan.target is not None and plan.target.loop is not None:
            control(model, plan.anatomy, plan.target.loop, run)
        if task is not None:
            task.register(model, blocks=len(plan.blocks), width=plan.condition_width, seed=seed)
        if plan.context != "raw":
            with empty_weights() if is_empty(model) else nullcontext():
                model.get_submodule(PREFIX).add_module(CONTEXT, hearings(plan))
    return run


def hearings(plan: Plan) -> nn.ModuleDict:
    """One for each block that has a predecessor. A network that is one block has one too: it is tried as any block."""
    anatomy, images = plan.anatomy, plan.target is not None and plan.target.placement == "image"
    features = plan.context == "features" or images  # of an expected image the stem makes a stream
    heard = anatomy.width if features or plan.target is None else plan.target.width
    listening = range(1, len(plan.blocks)) or range(1)
    return nn.ModuleDict({str(b): Hearing(heard, anatomy.width, anatomy.axes, norm=features) for b in listening})


def begin_conditioning(network: BlockwiseNetwork, *, seed: int) -> None:
    """Gives what conversion added to a network on the meta device the numbers that it begins with.

    They are those that `converted` gives a network with numbers: embedders come first from the seed, modulations and
    what listens to other blocks are zero, which as one expanded zero takes no memory however large the network is.
    """
    conditioning = network.conditioning
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for embedder in conditioning.embedder.values():
            fresh = NoiseEmbedding(network.plan.condition_width)
            embedder.load_state_dict(fresh.state_dict(), assign=True)
    for part in (conditioning.modulation, *(child for name, child in conditioning.named_children() if name == CONTEXT)):
        for module in part.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.zeros(()).expand(parameter.shape))


def whole_network(plan: Plan, source: Source) -> BlockwiseNetwork:
    """All blocks in memory, with untrained weights: the caller loads them."""
    task = task_of(plan)
    model = source.build().float()
    run = converted(model, plan, task)
    return BlockwiseNetwork(model, run, task, plan, tuple(range(len(plan.blocks))), "shared")


def single_block(
    plan: Plan, source: Source, block: int, tensors: Mapping[str, Tensor], *, first: int | None = None
) -> BlockwiseNetwork:
    """One block alone: built without weights, then only its own tensors and a stem and readout are filled in.

    Args:
        tensors: of the block and the periphery, by key.
        first: all blocks from this one on are there too, each with its own stem and readout.

    Raises:
        DBConvertError: they do not fit.
    """
    task = task_of(plan)
    with empty_weights():
        model = source.build()
        run = converted(model, plan, task)
    present = range(block if first is None else first, block + 1)
    strip(model, plan.anatomy, range(plan.layers_of(present[0]).start, plan.layers_of(block).stop))
    network = BlockwiseNetwork(model, run, task, plan, tuple(present), "single" if len(present) == 1 else "shared")
    drop_other_blocks(network)
    fill(network, tensors)
    if len(present) > 1:
        network.give_own_periphery()
    return network


def hollow_network(plan: Plan, source: Source) -> BlockwiseNetwork:
    """All blocks without a weight in memory, what a task adds apart."""
    task = task_of(plan)
    with empty_weights():
        model = source.build().float()
    run = converted(model, plan, task)
    return BlockwiseNetwork(model, run, task, plan, tuple(range(len(plan.blocks))), "shared")


def fill_blocks(
    network: BlockwiseNetwork,
    read: Callable[[int], Mapping[str, Tensor]],
    store: Store,
    *,
    own: bool,
    dtype: torch.dtype,
) -> dict[int, dict[str, Tensor]]:
    """Fills a hollow network part by part: the parameters of blocks get their place in a store, all else is in memory.

    Args:
        read: the tensors of a block and of the periphery, by key; what a task adds may lack, and keeps its numbers.
        own: every block gets a copy of the stem and the readout.
        dtype: of floating-point parameters in the store.

    Returns:
        where each block's parameters lie, by key.

    Raises:
        DBConvertError: the tensors do not fit, or the store is full.
    """
    fill_part(network, None, read(0), {})
    if own:
        network.give_own_periphery(copied=False)
    homes = {}
    for block in network.present:
        outlines = {
            key: torch.empty_like(value, dtype=dtype if value.is_floating_point() else None, device="meta")
            for key, value in network.block_tensors(block).items()
            if isinstance(value, nn.Parameter)
        }
        homes[block] = store.room(f"block-{block}", outlines)
        fill_part(network, block, read(block), homes[block])
    tie_again(network)
    return homes


def fill_part(
    network: BlockwiseNetwork, owner: int | None, tensors: Mapping[str, Tensor], homes: Mapping[str, Tensor]
) -> None:
    """Fills in what a block owns, or what none does."""
    wanted = {k: v for k, v in network.tensors().items() if network.owner(k) == owner}
    there = {k: v for k, v in wanted.items() if not v.is_meta and isinstance(v, nn.Parameter)}
    given = {**there, **{k: v for k, v in tensors.items() if network.owner(k) == owner}}
    check_keys(given, wanted, "the package's weights")
    for key in wanted:
        put(network.model, key, given[key], homes.get(key))


def drop_other_blocks(network: BlockwiseNetwork) -> None:
    """Removes the conditioning of all other blocks."""
    for name, parts in network.conditioning.named_children():
        if not isinstance(parts, nn.ModuleDict | nn.ParameterDict):
            continue
        for key in list(parts):
            if network.owner(f"{PREFIX}.{name}.{key}.") not in (*network.present, None):
                del parts[key]


def fill(network: BlockwiseNetwork, tensors: Mapping[str, Tensor]) -> None:
    """Puts real tensors in the place of a network's empty parameters, and ties again what is tied."""
    wanted = network.model.state_dict(keep_vars=True)
    tied = {name for group in network.plan.anatomy.tied for name in group[1:]}
    wanted = {key: value for key, value in wanted.items() if key not in tied}
    check_keys(tensors, wanted, "the package's weights")
    for key in wanted:
        put(network.model, key, tensors[key])
    tie_again(network)


def put(model: nn.Module, key: str, tensor: Tensor, room: Tensor | None = None) -> None:
    """Puts a copy of a tensor in the place of a parameter or buffer; a parameter's into `room`, where there is some."""
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    if name in module._parameters:
        if room is None:
            room = tensor.detach().clone()
            room = room.float() if room.is_floating_point() else room
        else:
            room.copy_(tensor.detach())
        module._parameters[name] = nn.Parameter(room.data)  # a view's version would be that of all in the store
    else:
        module._buffers[name] = tensor.clone()


def tie_again(network: BlockwiseNetwork) -> None:
    """
    Raises:
        DBConvertError: a parameter is still empty.
    """
    for first, *others in network.plan.anatomy.tied:
        for other in others:
            tie(network.model, first, other)
    empty = [name for name, p in network.model.named_parameters() if p.device.type == "meta"]
    if empty:
        raise DBConvertError(f"no weights for {', '.join(empty[:4])}", where="the package's weights")


def tie(model: nn.Module, first: str, other: str) -> None:
    """Registers the parameter `first` under the name `other` as well, where both modules are there."""
    modules = dict(model.named_modules())
    (a, name_a), (b, name_b) = (key.rpartition(".")[::2] for key in (first, other))
    if a in modules and b in modules:
        modules[b]._parameters[name_b] = modules[a]._parameters[name_a]


def with_own_peripheries(tensors: Mapping[str, Tensor]) -> bool:
    """Whether weights come from blocks that each have their own stem and readout."""
    return any(key.startswith(OWN + ".") for key in tensors)
