"""Running layers whose additions are written around their modules.

Each module of such a layer announces what it returns, and the addition that takes it is met where it happens: of a
layer that is not active it gives the stream alone. Additions are known by the tensor that they add, so that skipped
layers and modules without weights change nothing about which one is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dbconvert.anatomy import BranchPart
from dbconvert.graph.ops import ADDITIONS, DIFFERENCES
from dbconvert.graph.recompute import recomputed
from dbconvert.graph.tape import called
from dbconvert.graph.values import imitate, item, look_up, put_in


class PartModule(nn.Module):
    """Mixed into the class of a module that computes one branch of a layer.

    `db_layer_sites` fills in the layer's conditioning; `db_position` is the addition's in the layer, `db_final`
    whether it is the last of all.
    """

    db_run: Any
    db_index: int
    db_position: int
    db_final: bool
    db_part: BranchPart
    db_layer_sites: Any

    @property
    def enters(self) -> bool:
        return self.db_index == 0 and self.db_position == 0 and self.db_run.entry is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, part = self.db_run, self.db_part
        stream = look_up(args, kwargs, part.stream_in)
        if self.enters:
            stream = run.entered = run.entry(stream)
            args, kwargs = put_in(args, kwargs, part.stream_in, stream)
        if run.runs(self.db_index):
            if self.db_position == 0:
                self.db_layer_sites.fill(run.condition, run.filled, 0 if run.same is None else run.same())
            args, kwargs = run.given(part.stream_in, args, kwargs)
            call = partial(self.executed, super().__call__)
            again = run.recomputes(self.db_index)
            out = recomputed(self, call, stream, args, kwargs) if again else call(*args, **kwargs)
        else:
            out = imitate(part, stream.view_as(stream))
        branch = item(out, part.stream_out)
        run.waiting = (branch, self)
        return out

    def executed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.db_run.attending((self.db_index, self.db_position)):
            return call(*args, **kwargs)


class AroundModule(nn.Module):
    """Mixed into the class of the module whose forward adds."""

    db_run: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Joined(self.db_run):
            return super().forward(*args, **kwargs)


class Joined(TorchFunctionMode):
    """Meets the additions of branches to the stream."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        waiting = self.run.waiting
        adds = called(func).strip("_") in ADDITIONS | DIFFERENCES
        if waiting is None or not adds or not takes(args, waiting[0]):
            return func(*args, **(kwargs or {}))
        branch, part = waiting
        self.run.waiting = None
        stream = args[1] if args[0] is branch else args[0]
        if part.enters:
            args = tuple(branch if arg is branch else self.run.entered for arg in args[:2])
            stream = self.run.entered
        out = func(*args, **(kwargs or {})) if self.run.runs(part.db_index) else stream
        if not part.db_final:
            return out
        if self.run.keep:
            self.run.leaving = out
        return self.run.left(out, ())


def takes(args: tuple[Any, ...], branch: Tensor) -> bool:
    return len(args) > 1 and any(arg is branch for arg in args[:2])
