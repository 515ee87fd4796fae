"""The verdict on one network: analysed, proved, and asked again with a stack when only a part can be cut."""

from __future__ import annotations

import re
import traceback
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dbconvert.anatomy import Anatomy
from dbconvert.errors import Refused
from dbconvert.graph.analysis import analyse
from dbconvert.graph.proof import prove


@dataclass(frozen=True)
class Row:
    """What came of one class.

    Args:
        verdict: accepted, restricted, looped, part, refused, crash or not built.
        stack: where the layers are, for the first four.
        kind: of the refusal; of the whole network's for `part`.
        reason, node: why it is refused, not built or crashed, and where.
        notes: what the analysis found worth saying.
    """

    verdict: str
    stack: str = ""
    layers: int = 0
    width: int = 0
    kind: str = ""
    reason: str = ""
    node: str = ""
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v}


def judge(model: nn.Module, inputs: dict[str, Any]) -> Row:
    try:
        return proved(model, inputs, None)
    except Refused as refusal:
        whole = refusal
    except Exception as error:
        return crash(error)
    row = Row("refused", kind=whole.kind, reason=whole.reason, node=whole.node)
    for stack in offered(whole)[:1]:
        try:
            part = proved(model, inputs, stack)
        except Refused:
            return row
        except Exception as error:
            return crash(error)
        return Row("part", part.stack, part.layers, part.width, whole.kind, whole.reason, whole.node, part.notes)
    return row


def proved(model: nn.Module, inputs: dict[str, Any], stack: str | None) -> Row:
    anatomy: Anatomy = analyse(model, inputs, stack=stack)
    prove(model, anatomy, inputs)
    return Row(anatomy.verdict, anatomy.stack, anatomy.depth, anatomy.width, notes=anatomy.notes)


def crash(error: Exception) -> Row:
    tail = "".join(traceback.format_exception(error)[-4:])
    return Row("crash", kind=type(error).__name__, reason=str(error)[:300], node=tail)


def offered(refusal: Refused) -> list[str]:
    """The stacks that a refusal names as a way out, in its order."""
    if refusal.kind not in ("several-stacks", "dimensions"):
        return []
    stacks = refusal.facts.get("stacks")
    if isinstance(stacks, list | tuple):
        return [str(path) for path in stacks]
    listed = re.search(r"--stack PATH: (.*)", refusal.hint)
    if listed:
        return [part.rsplit(": ", 1)[0] for part in listed[1].split("; ")]
    return re.findall(r"--stack (?!PATH)(\S+)", refusal.hint)
