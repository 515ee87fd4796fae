"""All tasks. A network's task is the only one that accepts it, or the one that is asked for."""

from __future__ import annotations

from dbconvert.anatomy import Anatomy
from dbconvert.errors import UsageError
from dbconvert.tasks.base import Task
from dbconvert.tasks.causal_lm import CausalLM
from dbconvert.tasks.classification import Classification
from dbconvert.tasks.image_diffusion import ImageDiffusion
from dbconvert.tasks.masked_lm import MaskedLM
from dbconvert.tasks.recurrent import Recurrent
from dbconvert.tasks.token_classification import TokenClassification

TASKS: tuple[type[Task], ...] = (
    Classification,
    TokenClassification,
    CausalLM,
    MaskedLM,
    Recurrent,
    ImageDiffusion,
)


def refusal(task: type[Task], anatomy: Anatomy) -> str | None:
    """Why a task cannot use a network; None if it can."""
    if task.looped and anatomy.calls == 1:
        return "its layers run once"
    if anatomy.calls > 1 and not task.looped:
        return f"its layers run {anatomy.calls} times with the same weights"
    return task.refusal(anatomy)


def accepting(anatomy: Anatomy) -> list[type[Task]]:
    """Tasks that a network is given without being asked."""
    return [task for task in TASKS if refusal(task, anatomy) is None and not task.on_request(anatomy)]


def reasons(anatomy: Anatomy) -> str:
    """Every task and why it does not accept the network, for messages."""
    return "; ".join(f"{task.name}: {refusal(task, anatomy) or 'accepts'}" for task in TASKS)


def choose_task(anatomy: Anatomy, name: str | None) -> type[Task] | None:
    """The task asked for, or the only one that accepts the network; None when none or several do.

    Raises:
        UsageError: the task asked for does not exist or does not accept the network.
    """
    if name is None:
        found = accepting(anatomy)
        return found[0] if len(found) == 1 else None
    task = named(name)
    reason = refusal(task, anatomy)
    if reason is not None:
        raise UsageError(f"task {name} does not fit this network: {reason}")
    return task


def named(name: str) -> type[Task]:
    for task in TASKS:
        if task.name == name:
            return task
    raise UsageError(f"there is no task {name}", hint=f"tasks: {', '.join(task.name for task in TASKS)}")
