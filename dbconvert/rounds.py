"""How a looped core is run once in place of many times, as found by its trial: frozen facts, part of a plan."""

from __future__ import annotations

from dbconvert.anatomy import FunctionCall, Path
from dbconvert.schema import record


@record
class StatePlace:
    """Where a looped core takes its state: an argument of a function call while `module` runs, or of `module` itself.

    Args:
        module: path in the network.
        call: None for an argument of the module.
    """

    module: str
    argument: Path
    call: FunctionCall | None = None


@record
class Rounds:
    """What says how often a core runs: an argument of the network's forward, or an attribute of one of its modules.

    Args:
        module: path of the module with the attribute; None for an argument.
        name: dotted where it lies in an object of the module, as `config.loops`.
    """

    module: str | None
    name: str


@record
class Loop:
    """A core that runs again and again on what it made: the state.

    Args:
        places: where a round takes the state; none where the state is the stem's output itself.
        prelude: modules that run once in a pass, before the core.
        scale: root mean square of the state after the first round.
    """

    rounds: Rounds
    places: tuple[StatePlace, ...]
    prelude: tuple[str, ...]
    scale: float
