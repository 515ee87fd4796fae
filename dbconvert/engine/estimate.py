"""estimate: what every number of blocks would hold on a device, and cost, before anything is split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from dbconvert.engine.ablation import STEP, evidence
from dbconvert.engine.convert import converted
from dbconvert.engine.decide import decide, decide_context, refuse_uncuttable
from dbconvert.engine.estimate_records import SETTINGS, Advice, Estimate, Request, Row, Setting
from dbconvert.engine.holdings import WORD, Holding, Inventory, Weights, holding, inventory
from dbconvert.engine.jobs import keep_in_bf16
from dbconvert.engine.layer_kinds import layer_kinds
from dbconvert.engine.meter import Meter
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.opening import Opened, open_and_analyse
from dbconvert.engine.rehearsal import Case, Rehearsal
from dbconvert.errors import UsageError
from dbconvert.events import Reporter, Stage, silent
from dbconvert.plan import Context, NoiseRule, Rule, cut
from dbconvert.recipe import SplitOptions
from dbconvert.tasks.registry import choose_task

Hold = Callable[[Weights, Weights, int], Holding]
"""Resident weights, those in use, and activations, as a holding."""
USUAL_LENGTH = 1024
RESIDENT_OR_AWAY = (
    "resident: `train` of all blocks; away: train.inactive=host or disk, or a job of one block (`train --block N`)"
)
HEARING = "resident: `train` of all blocks; away: train.inactive=host or disk"


def estimate(
    source: str,
    *,
    request: Request = Request(),
    stack: str | None = None,
    seed: int = 0,
    trust: bool = False,
    drop_extra: bool = False,
    report: Reporter = silent,
) -> Estimate:
    """Measures an update of every number of blocks on fake tensors, and says which fit.

    Args:
        source: see `inspect`.
        request: memory, size of an update, optimiser.
        trust, drop_extra: see `inspect`.

    Raises:
        Refused: the network cannot be cut.
        DBConvertError, UsageError: it cannot be opened, or does not run at this size.
    """
    opened = open_and_analyse(
        source, stack=stack, weights=None, seed=seed, trust=trust, drop_extra=drop_extra, fetch=False, report=report
    )
    refuse_uncuttable(opened.anatomy)
    refuse_rounding(request)
    request, memory = replace(request, case=with_usual_length(opened, request.case)), request.memory
    network = as_one_block(opened, request.context, request.task)
    if request.case.precision == "bf16-true":
        keep_in_bf16(network)
    report(Stage("measuring the updates"))
    rows = rows_at(opened, network, request)
    smallest = {setting: fewest(rows, setting, memory) for setting in SETTINGS}
    best = choose(smallest)
    found = Estimate(
        network=opened.anatomy.network,
        task=None if network.decided_task is None else network.decided_task.name,
        depth=opened.anatomy.depth,
        request=request,
        rows=rows,
        smallest=smallest,
        best=best,
        evidence=() if best is None else evidence(best[0]),
        advice=(),
        notes=(saving(rows), *notes(network)),
    )
    if memory is None or best is not None:
        return found
    return replace(found, advice=tuple(what_would_fit(opened, network, found)))


def rows_at(opened: Opened, network: BlockwiseNetwork, request: Request, *, only: int | None = None) -> tuple[Row, ...]:
    """End-to-end and every number of blocks; or `only` one number."""
    depth, case = opened.anatomy.depth, request.case
    weights = inventory(network, request.optimizer, WORD // 2 if case.precision == "bf16-true" else WORD)
    hold = partial(holding, in_backward=request.in_backward)
    with Rehearsal(network, opened.inputs, case) as rehearsal:
        kinds = layer_kinds(opened.model, opened.anatomy)
        meter = Meter(rehearsal, kinds, remakes=request.recompute_modulation)
        if only is not None:
            return (row(meter, weights, hold, only),)
        fewest = 1 if network.plan.context == "raw" else 2
        blocks = (row(meter, weights, hold, count) for count in range(fewest, depth + 1))
        return (end_to_end(meter, weights, hold), *blocks)


def refuse_rounding(request: Request) -> None:
    """Raises UsageError for an optimiser that does not train weights in bf16."""
    if request.case.precision == "bf16-true" and request.optimizer == "sgd":
        raise UsageError(
            "--precision bf16-true needs an optimiser that rounds stochastically, and sgd rounds to the nearest",
            hint="use --optimizer adamw or adamw8bit, or --precision bf16",
        )


def with_usual_length(opened: Opened, case: Case) -> Case:
    """The length asked for, else the longest that positions reach, up to 1024; the example's where that is unknown."""
    longest = opened.source.longest()
    tokens = any(given.dtype == "int64" and len(given.shape) == 2 for given in opened.anatomy.inputs)
    if case.length is None and longest is not None and tokens:
        return replace(case, length=min(USUAL_LENGTH, longest))
    return case


def as_one_block(opened: Opened, context: Context | None = None, task_name: str | None = None) -> BlockwiseNetwork:
    """The network converted as one block of all layers, from which every run of layers can be tried."""
    anatomy = opened.anatomy
    chosen = choose_task(anatomy, task_name)
    options, whole = SplitOptions(start="original", context=context), cut(anatomy.depth, blocks=1)
    options = replace(options, context=decide_context(options, chosen, 2, anatomy))
    rule: Rule = "mask" if chosen is not None and chosen.rule == "mask" else "edm"
    plan, _ = decide(opened, options, NoiseRule(rule=rule), chosen, whole)
    task = chosen(anatomy, plan.target, plan.noise) if chosen is not None and plan.target is not None else None
    run = converted(opened.model, plan, task)
    return BlockwiseNetwork(opened.model, run, task, plan, (0,), "shared")


# -- rows ---------------------------------------------------------------------------------------------------------


def end_to_end(meter: Meter, weights: Inventory, hold: Hold) -> Row:
    depth = len(meter.kinds)
    own = weights.originals
    holdings = {Setting("resident", on): hold(own, own, meter.end_to_end(on)) for on in (False, True)}
    return Row(None, depth, holdings, depth, 1)


def row(meter: Meter, weights: Inventory, hold: Hold, count: int) -> Row:
    depth = len(meter.kinds)
    blocks = cut(depth, blocks=count)
    sizes = [last - first + 1 for first, last in blocks]
    holdings = {}
    for setting in SETTINGS:
        needs = (block_holding(meter, weights, hold, i, blocks, setting) for i in range(count))
        holdings[setting] = max(needs, key=lambda need: need.total)
    # Levels from sigma_max to sigma_min, one at each boundary: every block runs once, the last one twice.
    told = meter.rehearsal.network.plan.context != "raw"
    before = sum(first for first, _ in blocks) / count if told else 0.0
    return Row(count, max(sizes), holdings, depth + sizes[-1], count + 1, before)


def block_holding(
    meter: Meter,
    weights: Inventory,
    hold: Hold,
    active: int,
    blocks: tuple[tuple[int, int], ...],
    setting: Setting,
) -> Holding:
    """Of an update of one of the blocks. Earlier ones that it hears are brought one at a time, without their state."""
    in_use = weights.in_use(*blocks[active])
    resident = in_use
    if setting.inactive == "resident":
        resident = weights.all_blocks(len(blocks))
    elif meter.rehearsal.network.plan.context != "raw":
        resident += Weights(max((weights.block(*before).size for before in blocks[:active]), default=0))
    return hold(resident, in_use, meter.peak(*blocks[active], setting.checkpointing))


# -- choosing ---------------------------------------------------------------------------------------------------


def fewest(rows: tuple[Row, ...], setting: Setting, memory: int | None) -> int | None:
    """The smallest number of blocks whose update fits into `memory` bytes."""
    fitting = (r.blocks for r in rows if memory is not None and r.blocks and r.holdings[setting].total <= memory)
    return min(fitting, default=None)


def choose(smallest: dict[Setting, int | None]) -> tuple[int, Setting] | None:
    """The fewest blocks; of settings that need as few, the one that is least trouble."""
    found = [(count, order, setting) for order, (setting, count) in enumerate(smallest.items()) if count is not None]
    if not found:
        return None
    count, _, setting = min(found, key=lambda each: each[:2])
    return count, setting


def what_would_fit(opened: Opened, network: BlockwiseNetwork, found: Estimate) -> Iterator[Advice]:
    """The least that this update needs, and what one example an update and 8-bit state would need."""
    request, memory = found.request, found.request.memory
    yield advice("the least that this update needs", found.rows, memory)
    if request.case.batch > 1:
        alone = replace(request, case=replace(request.case, batch=1))
        yield advice("with one example an update", rows_at(opened, network, alone, only=found.depth), memory)
    if request.optimizer == "adamw":
        smaller = replace(request, optimizer="adamw8bit")
        yield advice("with AdamW's state in 8 bits", rows_at(opened, network, smaller, only=found.depth), memory)


def advice(change: str, rows: tuple[Row, ...], memory: int | None) -> Advice:
    """The smallest update of some rows; of equals the fewest blocks."""
    every = [(row.blocks, setting, held.total) for row in rows if row.blocks for setting, held in row.holdings.items()]
    blocks, setting, total = min(every, key=lambda each: (each[2], each[0]))
    return Advice(change, blocks, setting, total, memory is not None and total <= memory)


def saving(rows: tuple[Row, ...]) -> str:
    """The number of blocks from which on an update keeps fewer activations than end-to-end training."""
    plain = Setting("resident", False)
    whole = next(row.holdings[plain].activations for row in rows if row.blocks is None)
    counts = [row.blocks for row in rows if row.blocks is not None]
    more = [row.blocks for row in rows if row.blocks is not None and row.holdings[plain].activations >= whole]
    least = min((count for count in counts if count > max(more, default=0)), default=None)
    if least is None:
        return "no number of blocks keeps fewer activations than an end-to-end update"
    return f"an update keeps fewer activations than an end-to-end one from {least} block{'s' * (least > 1)} on"


def notes(network: BlockwiseNetwork) -> Iterator[str]:
    yield (
        "not counted: the context of CUDA and its libraries, workspaces of kernels and of the optimiser's step, "
        "gradients of activations on their way back, the batch itself, what the allocator loses to fragmentation"
    )
    yield (
        "checkpointing (train.checkpointing=true) runs every layer's forward twice. One update of each block runs the "
        f"layers of one end-to-end update, and stem and readout as often as there are blocks: {STEP}"
    )
    yield "measured as what autograd saves on the kernels of the CPU; those of other devices may save other tensors"
    if network.plan.context != "raw":
        yield (
            f"context {network.plan.context}: before an update of a block the layers before it run forward, without "
            "gradient; what they hold meanwhile is not counted, but for their weights"
        )
    yield HEARING if network.plan.context != "raw" else RESIDENT_OR_AWAY
    if network.decided_task is None:
        yield (
            "no task can train this network yet: measured is one pass of its own forward with the cross-entropy of all "
            "its outputs. Autoregressive training runs [clean ; noisy], twice the length: ask for twice --length"
        )
