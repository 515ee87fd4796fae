"""What positions see of each other in a network that is not to hide the future: masks changed on their way in.

Whatever sees a position is seen by it: a causal mask shows everything then, a window reaches both ways, and padding
stays hidden. Documents and padding of a batch can be kept apart on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dbconvert.anatomy import Path, SideAxes
from dbconvert.graph.attention import ATTENTION, Attending
from dbconvert.graph.functions import uncounted
from dbconvert.graph.two_streams import known_side


class Sight:
    """What happens to the masks of one forward pass.

    Args:
        sides: what the layers receive beside the stream, by argument.
        opened: whether masks are to hide the future no more.
        together: [N, S, S] bool, which positions may see each other at all; None when all may.
    """

    def __init__(self, sides: Mapping[Path, SideAxes], *, opened: bool, together: Tensor | None = None) -> None:
        self.sides, self.opened, self.together = sides, opened, together
        self.masks: dict[int, tuple[Tensor, Tensor]] = {}
        self.changed: set[int] = set()

    def beside(self, path: Path, value: Tensor) -> Tensor:
        """A side input as the layers are to receive it.

        Raises:
            DBConvertError: the analysis has not seen this argument.
        """
        known = known_side(self.sides, path, value)
        return self.mask(value) if len(known.sequence) == 2 else value

    def attention(self, _: object) -> TorchFunctionMode:
        return _Attention(self)

    def mask(self, given: Tensor, rank: int = 0) -> Tensor:
        """The mask in the place of a given one; one a pass for all layers.

        Args:
            rank: of the scores that it is broadcast to, where that is known.
        """
        if id(given) in self.changed:
            return given
        if id(given) not in self.masks:
            with uncounted():
                made = given.view(*[1] * (rank - given.dim()), *given.shape)
                made = both_ways(made) if self.opened else made
                made = made if self.together is None else limited(made, self.together)
            self.masks[id(given)] = given, made  # kept alive: its id is the key
            self.changed.add(id(made))
        return self.masks[id(given)][1]


class _Attention(Attending):
    """Gives attention the mask for it."""

    def __init__(self, sight: Sight) -> None:
        super().__init__()
        self.sight = sight

    def attend(self, given: dict[str, Any]) -> Tensor:
        if given["query"].shape[-2] == given["key"].shape[-2]:
            given["attn_mask"], given["is_causal"] = self.mask(given)
        return ATTENTION(**given)

    def mask(self, given: dict[str, Any]) -> tuple[Tensor | None, bool]:
        """The mask, and whether attention is to hide the future by itself."""
        mask: Tensor | None = given.get("attn_mask")
        causal = bool(given.get("is_causal")) and not self.sight.opened
        if mask is not None:
            return self.sight.mask(mask, given["query"].dim()), causal
        together = self.sight.together
        if together is None:
            return None, causal
        seen = together.tril() if causal else together
        return seen.view(len(seen), *[1] * (given["query"].dim() - 3), *seen.shape[1:]), False


def both_ways(mask: Tensor) -> Tensor:
    """[..., S, S] in which whatever sees a position is seen by it, padding excepted.

    Args:
        mask: bool, or added to the scores. A position hidden from itself is padding; where all are, True hides.
    """
    itself = mask.diagonal(dim1=-2, dim2=-1)[..., None, :]
    other = mask.transpose(-2, -1)
    if mask.dtype == torch.bool:
        hides = ~itself.any(-1, keepdim=True)
        return (((mask ^ hides) | (other ^ hides)) & (itself ^ hides)) ^ hides
    hidden = torch.finfo(mask.dtype).min
    return torch.where(itself <= hidden / 2, hidden, torch.maximum(mask, other))


def limited(mask: Tensor, together: Tensor) -> Tensor:
    """A mask that also hides what is not together, [N, S, S] bool."""
    seen = together.view(len(together), *[1] * max(mask.dim() - 3, 0), *together.shape[1:])
    if mask.dtype == torch.bool:
        hides = ~mask.diagonal(dim1=-2, dim2=-1).any(-1)[..., None, None]
        return ((mask ^ hides) & seen) ^ hides
    return torch.where(seen, mask, torch.finfo(mask.dtype).min)
