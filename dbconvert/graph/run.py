"""What a converted network is to do in its next forward pass, for all that was put into it to read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Path
from dbconvert.graph.looped import LoopPass
from dbconvert.graph.remade import remaking
from dbconvert.graph.tape import argument_leaves
from dbconvert.graph.values import item, put_in, replaced

Given = tuple[tuple[Any, ...], dict[str, Any]]
Filled = dict[object, Any]
"""Shifts and scales, and gates, by layer; and by site what its values are multiplied by and added to."""


class Volatile:
    """State of one forward pass: copies and pickles of the network start without it."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in self.volatile()}

    @classmethod
    def volatile(cls) -> set[str]:
        return {name for name, value in vars(cls).items() if value is None}


class Run(Volatile):
    """What the converted network is to do in its next forward pass. Reset by `BlockwiseNetwork` for every call.

    Args:
        active: the layers that run; the others hand the stream on. None runs all, as the original network does.
        condition: conditioning of the active layers, [N, width], or [N, G, width] where the positions fall into G
            groups of one length; None for the original layers.
        same: how many groups at the beginning have one and the same condition in all examples, for the layer that asks.
        filled: the modulations that layers made of the condition; passes without gradient of one and the same condition
            may share it, so that they are made once.
        embed: changes the token embeddings; it is also given the function that looks tokens up.
        entry: changes the stream as it enters the stack.
        beside: changes a tensor that an active layer receives beside the stream, by the argument's path.
        attention: what active layers attend in, by a key that tells them (and their parts) apart.
        last: runs the last of the active layers: it is given the layer's call and where its stream is, and called as
            the layer is, with the conditioning as the last positional argument.
        leave: changes the stream as it leaves the stack.
        exit: changes what enters the head.
        hold: takes what enters the head, which then gives nothing: a loss may read it in pieces.
        loop: how a looped core runs; None runs it as the network says.
        keep: whether to keep the stream that leaves the last layer, as `leaving`.
        entered, waiting: of layers whose additions are written around them: the changed stream, and the branch that
            is to be added next.
        checkpointed: layers of which autograd keeps what enters them, and which run again for the backward pass; of
            all passes.
        remakes: whether conditioned values are made again for the backward pass, see `dbconvert.graph.remade`; in all
            passes.
    """

    checkpointed: Collection[int] = ()
    remakes: bool = False

    active: range | None = None
    condition: Tensor | None = None
    same: Callable[[], int] | None = None
    filled: Filled | None = None
    embed: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None
    entry: Callable[[Tensor], Tensor] | None = None
    beside: Callable[[Path, Tensor], Tensor] | None = None
    attention: Callable[[object], AbstractContextManager[Any]] | None = None
    last: Callable[..., Any] | None = None
    leave: Callable[[Tensor], Tensor] | None = None
    exit: Callable[[Tensor], Tensor] | None = None
    hold: list[Tensor] | None = None
    loop: LoopPass | None = None
    keep: bool | None = None
    leaving: Tensor | None = None
    entered: Tensor | None = None
    waiting: tuple[Tensor, nn.Module] | None = None

    def reset(self) -> None:
        for name in self.volatile():
            setattr(self, name, None)

    def runs(self, layer: int) -> bool:
        """Whether a layer is to run, and not to hand its stream on."""
        return self.active is None or layer in self.active

    def recomputes(self, layer: int) -> bool:
        """Whether a layer is to run again for its backward pass."""
        return layer in self.checkpointed and torch.is_grad_enabled()

    def attending(self, key: object) -> AbstractContextManager[Any]:
        """What a layer, or a part of one, runs in."""
        attention = nullcontext() if self.attention is None else self.attention(key)
        return remaking(attention) if self.remakes and self.condition is not None else attention

    def given(self, stream: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        """A layer's arguments with those beside the stream changed."""
        if self.beside is not None:
            for path, value in argument_leaves(args, kwargs):
                if isinstance(value, Tensor) and path != stream:
                    args, kwargs = put_in(args, kwargs, path, self.beside(path, value))
        return args, kwargs

    def left(self, out: Any, stream: Path) -> Any:
        """The last layer's output with the stream changed as it leaves the stack."""
        return out if self.leave is None else replaced(out, stream, self.leave(item(out, stream)))
