"""Acting on single calls of torch functions while a module runs: where a layer is written without modules.

The original forward runs as it is. A call is known by its name and by how many calls of that name the module made
before it, which is what the tape wrote down; nothing is traced again, so that other shapes, train mode, caches and
compilation need no second version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from dbconvert.anatomy import FunctionCall, Path
from dbconvert.graph.tape import called
from dbconvert.graph.values import look_up, put_in

Act = Callable[[Tensor], Tensor]
Results = dict[FunctionCall, list[Act]]
Arguments = dict[FunctionCall, list[tuple[Path, Act]]]


def uncounted() -> AbstractContextManager[None]:
    """Within, torch functions are not seen by `Intercepted`: conditioning must not count among a layer's own calls."""
    return torch._C.DisableTorchFunction()


class Intercepted(TorchFunctionMode):
    """Changes arguments and results of chosen calls while it is active.

    Args:
        results: what to do with the result of a call, in order.
        arguments: what to do with an argument of a call.
    """

    def __init__(self, results: Results, arguments: Arguments) -> None:
        super().__init__()
        self.results, self.arguments = results, arguments
        self.left = {*results, *arguments}
        self.names = {call.name for call in self.left}
        self.seen: Counter[str] = Counter()
        self.away = False

    def __exit__(self, *error: Any) -> None:
        if not self.away:
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def retire(self) -> None:
        """Ends it early once all calls were met, if nothing was begun within it: what it only counts costs time."""
        if not self.left and not self.away and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.away = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = called(func)
        if name not in self.names:
            return func(*args, **kwargs)
        call = FunctionCall(name, self.seen[name])
        self.seen[name] += 1
        self.left.discard(call)
        for path, act in self.arguments.get(call, ()):
            args, kwargs = put_in(args, kwargs, path, act(look_up(args, kwargs, path)))
        out = func(*args, **kwargs)
        for change in self.results.get(call, ()):
            out = change(out)
        return out
