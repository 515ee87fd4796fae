"""What a recipe may not ask of a package, a task or a machine."""

from __future__ import annotations

import torch

from dbconvert.data.batches import Data
from dbconvert.engine.convert import task_of
from dbconvert.engine.kept_states import refuse_states
from dbconvert.engine.methods import METHODS
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.refit import refuse_alone
from dbconvert.errors import UsageError
from dbconvert.plan import Plan
from dbconvert.recipe import Recipe, about_samples
from dbconvert.tasks.base import Task
from dbconvert.tasks.registry import named


def refuse(plan: Plan, recipe: Recipe, block: int | None) -> None:
    """Raises UsageError for what cannot be trained as it is asked for."""
    check_z(plan, recipe)
    check_block(block, plan, recipe)
    refuse_states(plan, recipe, block)
    check_table(plan, recipe)
    check_weight(plan, recipe)
    check_dropout(plan, recipe)
    check_attention(plan, recipe)
    check_compile(plan, recipe)
    check_method(plan, recipe)
    check_samples(recipe)
    check_inactive(plan, recipe, block)
    refuse_alone(plan, recipe)


def check_samples(recipe: Recipe) -> None:
    """Refuses what is only asked of finished runs."""
    for key in about_samples(recipe.eval):
        raise UsageError(
            f"eval.{key} is about samples, and training takes none", hint="give it to dbconvert eval, or compare"
        )


def check_inactive(plan: Plan, recipe: Recipe, block: int | None) -> None:
    """Refuses to take blocks away where there is one thing that trains."""
    if recipe.train.inactive == "resident":
        return
    why = None
    if not METHODS[recipe.train.method].stepwise:
        why = f"train.method={recipe.train.method} trains all that it holds in every update"
    elif block is not None:
        why = f"--block {block} trains one block alone"
    elif len(plan.blocks) == 1:
        why = "the network is one block"
    if why is not None:
        raise UsageError(
            f"train.inactive={recipe.train.inactive} has nothing to take away",
            why=why,
            hint="leave it out, or set train.inactive=resident",
        )


def check_table(plan: Plan, recipe: Recipe) -> None:
    """Refuses blocks with stems of their own whose targets are the rows of a stem's table."""
    own = plan.target is not None and plan.target.table == "own"
    if own and recipe.train.periphery == "frozen-target" and recipe.train.method == "blocks":
        raise UsageError(
            "the targets are the network's own embeddings, which blocks with their own stems would not share",
            hint="split with --table fresh (split.table=fresh in a recipe)",
        )
    told = plan.context == "estimate" and plan.target is not None and plan.target.placement == "mask"
    if told and recipe.train.periphery == "frozen-target" and recipe.train.method == "blocks":
        raise UsageError(
            "the estimate that blocks hear is told in the network's own embeddings, which blocks with their own stems "
            "would not share",
            hint="split with --context features (split.context=features in a recipe)",
        )


def check_compile(plan: Plan, recipe: Recipe) -> None:
    """Refuses what compiled layers cannot do."""
    train = recipe.train
    if not train.compile:
        return
    if train.method == "forward-forward":
        raise UsageError(
            "train.compile does not go with train.method=forward-forward",
            why="its layers go backward one by one, from within the pass",
            hint="leave one of them out",
        )
    if train.recompute_modulation:
        raise UsageError(
            "train.compile does not go with train.recompute_modulation",
            why="the compiler decides itself what is kept for the backward pass, and makes modulated values again",
            hint="leave one of them out",
        )
    cuda = torch.cuda.is_available() and not train.cpu
    if task_of(plan).doubled and (train.attention == "flex" or (train.attention == "auto" and cuda)):
        raise UsageError(
            f"train.compile does not go with train.attention={train.attention}",
            why="FlexAttention compiles itself, for masks that a compiled layer would have to hold fixed",
            hint="add train.attention=sdpa",
        )


def check_weight(plan: Plan, recipe: Recipe) -> None:
    """Refuses the weight of noise where tokens are hidden, whose losses have one of their own."""
    if plan.noise.rule == "mask" and recipe.train.weight == "edm":
        raise UsageError(
            "train.weight=edm is for noisy targets, and hidden tokens have none",
            hint="leave it at `none`: their losses are weighted by -alpha' / (1 - alpha) already",
        )


def check_dropout(plan: Plan, recipe: Recipe) -> None:
    """Refuses to leave out classes where the network is told none."""
    picture = plan.anatomy.picture
    told = named(str(plan.task)).generative and picture is not None and picture.labels
    if recipe.train.label_dropout and not told:
        raise UsageError("train.label_dropout leaves out classes, and this network is told none", hint="leave it out")


def refuse_full_table(plan: Plan, recipe: Recipe, examples: Data) -> None:
    """Raises UsageError where all rows of the network's table are classes of the data, and none can stand for none."""
    if not recipe.train.label_dropout or plan.target is None:
        return
    rows = plan.target.classes
    if examples.label_counts()[rows - 1 :].any():
        raise UsageError(
            f"train.label_dropout needs a row that stands for no class, and the data uses all {rows} rows of the "
            "network's table of classes",
            hint=f"give the network's table of classes one row more ({rows + 1})",
        )


def check_attention(plan: Plan, recipe: Recipe) -> None:
    """Refuses an attention that this task or this machine does not have."""
    if recipe.train.attention == "auto":
        return
    if not task_of(plan).doubled:
        raise UsageError(f"train.attention has no use in task {plan.task}", hint="leave it out")
    if recipe.train.attention == "flex" and (recipe.train.cpu or not torch.cuda.is_available()):
        raise UsageError(
            "FlexAttention has no backward pass on CPU", hint="leave train.attention at `auto`, which is `sdpa` there"
        )


def check_method(plan: Plan, recipe: Recipe) -> None:
    """Refuses a form of training that this network cannot have, or this task."""
    refuse_unlabelled(named(str(plan.task)), recipe.train.method)
    METHODS[recipe.train.method].refuse(plan, recipe)


def refuse_unlabelled(task: type[Task], method: str) -> None:
    """Raises UsageError for a form of training that is told one label an example, where there is none."""
    if METHODS[method].labelled and (task.text or task.tagged or task.denoiser):
        raise UsageError(
            f"train.method={method} is for one label an example, and the task is {task.name}",
            hint="use train.method=end-to-end",
        )


def check_z(plan: Plan, recipe: Recipe) -> None:
    """Refuses targets that the task cannot take from the sampler."""
    known = named(str(plan.task)).zs
    if recipe.train.z not in known:
        raise UsageError(f"task {plan.task} has no train.z `{recipe.train.z}`", hint=f"it has {', '.join(known)}")


def refuse_stand_ins(plan: Plan, network: BlockwiseNetwork, recipe: Recipe) -> None:
    """Refuses to run layers again whose parts are the periphery: blocks with their own would meet the template then."""
    layers = tuple(layer.path + "." for layer in plan.anatomy.layers)
    inside = [key for key in network.periphery_tensors() if network.is_template(key) and key.startswith(layers)]
    if recipe.train.checkpointing and inside:
        raise UsageError(
            f"{inside[0]} lies in a layer and belongs to the stem or readout, of which blocks have their own: with "
            "train.checkpointing they would meet another's in their backward pass",
            hint="train without train.checkpointing"
            + (", or with train.periphery=shared" if recipe.train.method == "blocks" else ""),
        )


def check_block(block: int | None, plan: Plan, recipe: Recipe) -> None:
    """Refuses single-block jobs that could not stand alone."""
    if block is None:
        return
    if not 0 <= block < len(plan.blocks):
        raise UsageError(f"there is no block {block}", hint=f"blocks: 0 to {len(plan.blocks) - 1}")
    if recipe.train.method != "blocks":
        raise UsageError(f"train.method={recipe.train.method} does not train single blocks", hint="leave out --block")
    if recipe.train.periphery != "frozen-target":
        raise UsageError(
            "a single block cannot train the shared periphery, which the other blocks would not see",
            hint="add train.periphery=frozen-target, which freezes the target table and gives each block its own "
            "stem and readout",
        )
