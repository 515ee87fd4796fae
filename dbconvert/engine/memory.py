"""What one update of a job holds in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dbconvert.data.batches import OrderedBatches, seed_all
from dbconvert.data.examples import LABEL, made_equal
from dbconvert.data.images import entering
from dbconvert.engine.layer_kinds import layer_kinds
from dbconvert.engine.method import Job
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.optimizers import moment_bytes, state_bytes
from dbconvert.engine.ram import memory_errors
from dbconvert.errors import DBConvertError
from dbconvert.graph.account import parameter_bytes, saved_bytes
from dbconvert.graph.untouched import unchanged_state
from dbconvert.graph.values import example_shape
from dbconvert.schema import record
from dbconvert.tasks.base import Inputs


@record
class UnitMemory:
    """One unit: what its update needs, with the periphery it trains too.

    Args:
        trainable: parameters that its update changes, at the most.
        state: bytes of those parameters, their gradients and optimiser state.
        activations: bytes that autograd keeps for the backward pass at the recipe's batch; with activation
            checkpointing what enters the layers, and all of the largest layer, which is run again.
    """

    name: str
    trainable: int
    state: int
    activations: int


@record
class MemoryReport:
    """All units of a job, and the most that the run holds on the device beside activations: the state of all blocks, or
    that of one where inactive blocks are away, of two with `train.prefetch`.

    Args:
        used_parameters: that this form of training has a use for, wherever they are.
    """

    units: tuple[UnitMemory, ...]
    used_parameters: int
    resident_parameters: int
    resident_state: int

    @property
    def largest(self) -> UnitMemory:
        return max(self.units, key=lambda unit: unit.state + unit.activations)


def measure(job: Job, device: torch.device) -> MemoryReport:
    """Counts the state and runs one forward pass of every unit on a real batch; weights stay as they are.

    Args:
        device: where the network is.
    """
    options = job.recipe.optimizer
    units = tuple(
        UnitMemory(
            unit.name,
            max(sum(p.numel() for p in turn) for turn in turns(job, block)),
            max(state_bytes(turn, options) for turn in turns(job, block)),
            activations(job, block, device),
        )
        for block, unit in job.units.items()
    )
    held = [resident(job, block) for block in job.units]
    used = {id(p): p for p in job.method.held(job.network)}.values()
    return MemoryReport(
        units, sum(p.numel() for p in used), max(count for count, _ in held), max(size for _, size in held)
    )


def resident(job: Job, block: int) -> tuple[int, int]:
    """Parameters on the device while a block trains, and bytes of them with their gradients and optimiser state."""
    options, network, train = job.recipe.optimizer, job.network, job.recipe.train
    owned = {id(p): network.owner(name) for name, p in network.model.named_parameters()}
    there = {id(p): p for p in network.parameters() if train.inactive == "resident" or owned[id(p)] in (None, block)}
    mine = {unit.name: job.method.turns(job, b) for b, unit in job.units.items()}
    sets = [mine.get(unit.name, [unit.parameters]) for unit in job.all_units()]
    learning = [p for turns in sets for p in max((turn.values() for turn in turns), key=parameter_bytes)]
    trained = {id(p): p for p in learning if id(p) in there}
    frozen = parameter_bytes(p for key, p in there.items() if key not in trained)
    count, size = sum(p.numel() for p in there.values()), state_bytes(trained.values(), options) + frozen
    if train.prefetch:
        others = (list(unit.parameters.values()) for b, unit in job.units.items() if b != block)
        brought = max(others, key=parameter_bytes)
        count += sum(p.numel() for p in brought)
        size += parameter_bytes(brought) + moment_bytes(brought, options)
    return count, size


def turns(job: Job, block: int) -> list[list[nn.Parameter]]:
    """The sets of parameters of which an update of a block trains one, each with what it shares with others."""
    shared = [p for unit in job.units_of(block) if unit is not job.units[block] for p in unit.parameters.values()]
    return [[*turn.values(), *shared] for turn in job.method.turns(job, block)]


def activations(job: Job, block: int, device: torch.device) -> int:
    """Bytes that autograd has saved at the most in one update of a block at the recipe's batch."""
    recipe, network = job.recipe, job.network
    micro = max(1, recipe.train.batch // recipe.train.accumulate)
    indices = next(iter(OrderedBatches(len(job.examples), micro, [block], recipe.seed)))
    if job.mover is not None:
        job.mover.activate(block)
    batch = {name: value.to(device) for name, value in job.examples.__getitems__(indices).items()}
    labels = batch.pop(LABEL)
    ready = {k: entering(v, recipe.data.image) for k, v in batch.items()}
    inputs, labels = network.task.arranged(ready, labels)

    with unchanged_state(network), torch.random.fork_rng(devices=[]):
        network.train()
        seed_all(0)
        job.units_of(block)
        uniform = torch.rand(network.task.level_shape(labels))
        sigma = job.method.levels(job, block, labels, uniform).to(device)
        try:
            mixed = torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision != "fp32")
            with mixed, memory_errors(f"one update at batch {recipe.train.batch}"):
                passes = job.method.passes(job, block, inputs, labels, sigma)
                return max(most_saved(job, block, one) for one in passes)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise failed(error, inputs, network) from error


def most_saved(job: Job, block: int, loss: Callable[[], Tensor]) -> int:
    """Of `loss()`; where layers are run again for their backward pass, with any one of them saved as a whole."""
    network, run = job.network, job.network.run
    if not run.checkpointed:
        return saved_bytes(loss, network.parameters())
    kinds = layer_kinds(network.model, network.plan.anatomy)
    every, found = run.checkpointed, []
    try:
        for whole in {kinds[layer]: layer for layer in job.method.active(job, block)}.values():
            run.checkpointed = [layer for layer in every if layer != whole]
            found.append(saved_bytes(loss, network.parameters()))
    finally:
        run.checkpointed = every
    return max(found)


def failed(error: Exception, inputs: Inputs, network: BlockwiseNetwork) -> DBConvertError:
    """The network cannot run a batch of the data."""
    given = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
    seen = ", ".join(f"{known.name} {list(known.shape)}" for known in network.plan.anatomy.inputs)
    picture = next((example_shape(known) for known in network.plan.anatomy.inputs), ())
    reason = str(error).strip().split("\n", 1)[0]
    return DBConvertError(
        f"the network fails on a batch of the data: {reason}",
        where=f"batch: {given}; the split saw: {seen}",
        hint=f"give data of the shape that the network takes ({made_equal(picture)}), "
        "or split again with an example_inputs() that looks like the data",
    )
