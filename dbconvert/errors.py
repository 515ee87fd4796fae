"""What can go wrong, said once: what, where, why and what to try."""

from __future__ import annotations


class DBConvertError(Exception):
    """A failure that a user can understand and act on.

    Args:
        message: what went wrong, one sentence.
        where: the file, node or block it happened at.
        why: the reason, when the message does not say it.
        hint: what to try next.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        parts = [self.message]
        for label, text in (("where", self.where), ("why", self.why), ("try", self.hint)):
            if text:
                parts.append(f"  {label}: {text}")
        return "\n".join(parts)


class UsageError(DBConvertError):
    """The request itself is wrong: an impossible option, an unknown key, an occupied folder."""

    exit_code = 2


class Refused(DBConvertError):
    """The network cannot be converted. `node` names the offending node of the graph.

    Args:
        reason: one sentence a user understands.
        node: name of the graph node, with its module path and source line when known.
        kind: a short stable word for the reason (`dimensions`, `not-residual`, `no-stack`,
            `several-stacks`, `control-flow`, `functional`, ...).
        hint: the way out, if there is one.
        facts: what the analysis had found by then (stack, layers, width, streams).
    """

    def __init__(
        self,
        reason: str,
        *,
        node: str = "",
        kind: str,
        hint: str = "",
        facts: dict[str, object] | None = None,
    ) -> None:
        super().__init__(reason, where=node, hint=hint)
        self.reason = reason
        self.node = node
        self.kind = kind
        self.facts = facts or {}
