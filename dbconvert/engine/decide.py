"""The decisions of a split: blocks, noise, target, start, conditioning."""

from __future__ import annotations

import platform
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version

from dbconvert.anatomy import Anatomy
from dbconvert.conditioning.modulation import Start, condition_width
from dbconvert.engine.noise import UNIFORM, fit_noise, preview_noise, refuse_misfit
from dbconvert.engine.opening import Opened
from dbconvert.engine.predicting import decide_prediction, taken_for, within_range
from dbconvert.engine.refit import refuse_refit
from dbconvert.engine.twin import one_thread
from dbconvert.errors import Refused, UsageError
from dbconvert.graph.inject import site_features
from dbconvert.graph.tape import as_written
from dbconvert.graph.values import joined
from dbconvert.plan import SCHEMA_VERSION, Context, NoiseFit, NoiseRule, Plan, Target, cut
from dbconvert.recipe import SplitOptions
from dbconvert.tasks.base import Task
from dbconvert.tasks.registry import reasons

LIBRARIES = ("dbconvert", "torch", "transformers", "accelerate", "safetensors")


def decide_blocks(
    anatomy: Anatomy, options: SplitOptions, task: type[Task] | None = None
) -> tuple[tuple[int, int], ...]:
    given = [o for o in (options.blocks, options.layers, options.layers_per_block) if o is not None]
    if len(given) > 1 and not (options.blocks and options.layers and len(options.layers) == options.blocks):
        raise UsageError("blocks, layers and layers-per-block say the same thing twice", hint="give one of them")
    looped = task is not None and task.looped
    refuse_uncuttable(anatomy, looped=looped)
    if options.layers_per_block is not None:
        whole, rest = divmod(anatomy.depth, options.layers_per_block)
        sizes = (options.layers_per_block,) * whole + (rest,) * bool(rest)
        found = cut(anatomy.depth, sizes=sizes)
    else:
        found = cut(anatomy.depth, blocks=options.blocks or (1 if looped else 3), sizes=options.layers)
    if looped and len(found) > 1:
        raise UsageError(
            f"a looped core is not cut, and {len(found)} blocks were asked for",
            why="it runs as a whole at every noise level, with one set of weights: one block serves them all",
            hint="leave the number of blocks out, or --blocks 1",
        )
    return found


def refuse_uncuttable(anatomy: Anatomy, *, looped: bool = False) -> None:
    """Weights that two blocks would share tie them together; `looped` where the task wants the same ones again."""
    if anatomy.calls > 1 and not looped:
        raise Refused(
            f"each layer is called {anatomy.calls} times with the same weights, so its calls cannot be told apart",
            node=anatomy.stack,
            kind="looped",
            hint=f"a looped stack is not cut; trained it can be as a whole: {reasons(anatomy)}",
        )
    for group in anatomy.tied:
        homes = {anatomy.layer_of(name) for name in group}
        if len(homes) > 1 and homes != {None}:
            raise Refused(
                "a weight belongs to more than one layer, or to a layer and its surroundings",
                node=", ".join(group),
                kind="tied-layers",
                hint="give each its own weight",
            )


def decide_context(options: SplitOptions, task: type[Task] | None, blocks: int, anatomy: Anatomy) -> Context:
    """What is asked for, or else the task's own, where there is more than one block that can hear another.

    Raises:
        UsageError: blocks cannot hear each other so.
    """
    if options.context is None:
        return "raw" if task is None or blocks < 2 or joined(anatomy) else task.contexts[0]
    if options.context == "raw":
        return "raw"
    if joined(anatomy):
        raise UsageError(
            f"context `{options.context}` lets a block hear the stream that leaves the last layer, and in this network "
            "two streams that enter the first one leave the last as one",
            hint="leave it at `raw`",
        )
    looped = task is not None and task.looped
    if blocks < 2 or looped:
        raise UsageError(
            f"context `{options.context}` is what a block hears of the one before it, and there is only one",
            why="a looped core is one block that serves all levels: its predecessor is itself" if looped else "",
            hint="leave it at `raw`" + (", and see train.z=on-policy" if looped else ", or cut into more blocks"),
        )
    offered = () if task is None else tuple(name for name in task.contexts if name != "raw")
    if options.context not in offered:
        whose = "a network without a task" if task is None else f"task {task.name}"
        known = f"it has {', '.join(offered)}" if offered else "leave it at `raw`"
        raise UsageError(f"{whose} has no context `{options.context}`", hint=known)
    return options.context


def decide(
    opened: Opened,
    options: SplitOptions,
    noise: NoiseRule,
    task: type[Task] | None,
    blocks: tuple[tuple[int, int], ...],
) -> tuple[Plan, NoiseFit]:
    anatomy = opened.anatomy
    target = decide_target(opened, task, options) if task is not None else None
    rule = replace(noise, rule=noise.rule or (task.rule if task is not None else "edm"))
    if task is not None:
        refuse_misfit(rule, task)
    rule = within_range(rule, target)
    refuse_refit(rule)
    if rule.rule == "auto" and target is not None:
        fit = preview_noise(rule, len(blocks), target)
    elif rule.rule == "auto":
        raise UsageError(
            "noise `auto` is fitted to a task's targets, and no task was decided",
            why=reasons(anatomy),
            hint="name one with --task, or use --noise edm",
        )
    else:
        fit = fit_noise(rule, len(blocks), None, None, UNIFORM)
    fit.intervals()  # refuses levels that do not ascend and a negative overlap
    plan = Plan(
        schema_version=SCHEMA_VERSION,
        versions={**{name: version(name) for name in LIBRARIES}, "python": platform.python_version()},
        source=opened.source.ref,
        anatomy=anatomy,
        blocks=blocks,
        start=decide_start(opened, options.start),
        condition_width=options.condition_width or default_width(anatomy),
        task=task.name if task is not None else None,
        target=target,
        noise=rule,
        preview=fit,
        weights=opened.weights,
        pretrained=opened.pretrained,
        files={},
        shapes={},
        context=options.context or "raw",
        modulation=options.modulation,
    )
    return plan, fit


@as_written()
def decide_target(opened: Opened, task: type[Task], options: SplitOptions) -> Target:
    """What the task decides, with what it learns by running the network or its twin.

    Raises:
        UsageError: the task has no such target table.
        Refused: the network does not do what the task needs, or there is nothing to try it on.
    """
    target = task.decide(opened.anatomy)
    if options.table is not None and options.table not in task.tables:
        raise UsageError(f"{task.name} has no target table `{options.table}`", hint=f"tables: {', '.join(task.tables)}")
    prediction = decide_prediction(opened, task, options)
    target = replace(target, table=options.table or task.tables[0], prediction=prediction)
    example = opened.example
    with one_thread() if opened.large else nullcontext():
        anatomy, model = (opened.anatomy, None) if example is None else (example.anatomy, example.model)
        target = task.place(target, anatomy, model, options.entry, options.readout)
    if not task.tried:
        return target
    if example is None:
        raise Refused(
            f"the network is too large to be built, has no twin, and {task.name} has to try it",
            kind="untried",
            hint="--prove builds it with its weights, whatever they take",
        )
    if task.looped and opened.large:
        raise Refused(
            f"the network is too large to be built unasked, and {task.name} has to try it itself",
            kind="untried",
            hint="--prove builds it with its weights, whatever they take",
        )
    with one_thread() if opened.large else nullcontext():
        return task.learn(example.model, example.anatomy, target)


def decide_start(opened: Opened, wanted: Start | None) -> Start:
    if wanted is not None:
        return wanted
    return "original" if opened.pretrained or opened.anatomy.post_norm else "zero"


def default_width(anatomy: Anatomy) -> int:
    """The narrowest that any layer asks for; networks that are conditioned already have nothing to modulate."""
    widths = []
    for layer in (layer for layer in anatomy.layers if layer.branches):
        norms, gates = site_features(layer)
        widths.append(condition_width(layer.parameters, 2 * sum(norms) + sum(gates)))
    return min(widths, default=condition_width(0, 0))


def cautions(plan: Plan) -> list[str]:
    """What the user should know before training."""
    found = []
    if plan.task is None:
        found.append(f"no task fits this network ({reasons(plan.anatomy)}): it can be split, but not trained")
    if plan.pretrained:
        found.append("pure block-wise training makes a pretrained network forget: its ordinary loss gets worse")
    taken = taken_for(plan)
    if taken is not None:
        found.append(taken)
    if plan.anatomy.verdict == "restricted":
        found.append(f"only {plan.anatomy.stack} is cut; the rest belongs to the periphery, which every block trains")
    if plan.context != "raw":
        found.append(listening(plan))
    return found


def listening(plan: Plan) -> str:
    """What it means that blocks hear each other."""
    what = "the stream that left its layers" if plan.context == "features" else "its estimate of the target"
    if plan.context == "estimate" and plan.target is not None and plan.target.placement == "image":
        what = "what the stem makes of the image that it expects"
    return (
        f"context {plan.context}: every block hears {what} from the one before it, so that blocks are not independent: "
        "each needs the forward pass of its predecessors, and one trained alone wants their finished runs"
    )
