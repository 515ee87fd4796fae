"""One label an example: y is the label's embedding, which enters as a noisy token or is added to the stream.

Where there is a class token the label enters there: added to its embedding, or (`replace`) in its place, as in the
reference. A network whose layers take one token more gets it as that, and the head reads it; in others it is added to
every position, for convolutions a bias a channel.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy
from dbconvert.conditioning.modulation import fit
from dbconvert.graph.placing import with_token
from dbconvert.graph.two_streams import positions_axis
from dbconvert.plan import Entry, Readout, Target
from dbconvert.tasks.base import Change, Corruption, Headline, Inputs, Passage
from dbconvert.tasks.discrete import denoise_before_head
from dbconvert.tasks.label_place import own_token, placed, reading
from dbconvert.tasks.labels import LabelTask, unfit


class Classification(LabelTask):
    """Networks that map an input to one vector of class scores by a linear head on features of the stream's width."""

    name: ClassVar[str] = "classification"
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline("accuracy from z = 0", "accuracy_zero", "accuracy"),
        Headline("accuracy over draws", "accuracy_draw"),
    )

    @staticmethod
    def refusal(anatomy: Anatomy) -> str | None:
        head = anatomy.head
        if head is None:
            return "the network's output is not the result of one linear head"
        if not head.pooled:
            return "the head reads every position, not one vector an example"
        if head.labels > 1:
            return f"the head tells {head.labels} labels an example"
        return unfit(head, anatomy.width)

    @staticmethod
    def decide(anatomy: Anatomy) -> Target:
        assert anatomy.head is not None
        return Target(anatomy.head.outputs, anatomy.width, "add", own_token(anatomy))

    @staticmethod
    def place(
        target: Target, anatomy: Anatomy, model: nn.Module | None, entry: Entry | None, readout: Readout | None
    ) -> Target:
        return placed(target, anatomy, model, entry, readout)

    def target_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return len(next(iter(inputs.values()))), self.target.width

    def passage(self, model: nn.Module, block: int, inputs: Inputs, corruption: Corruption) -> Passage:
        leave = denoise_before_head(model, block, corruption, corruption.condition)
        arriving, target = self.arriving(corruption), self.target
        if target.placement == "replace":
            assert target.parameter is not None
            kind = model.get_parameter(target.parameter).dtype
            instead, entry = {target.parameter: arriving[:, None].to(kind)}, None
        else:
            instead, entry = {}, self.entry(arriving)
        read = reading(target, self.anatomy.axes)
        return Passage(inputs, corruption.condition, entry=entry, leave=read, exit=leave, instead=instead)

    def arriving(self, corruption: Corruption) -> Tensor:
        """c_in z, [N, d]."""
        return corruption.z * corruption.scaling.c_in(corruption.sigma)[:, None]

    def entry(self, arriving: Tensor) -> Change:
        axes, placement = self.anatomy.axes, self.target.placement

        def enter(stream: Tensor) -> Tensor:
            if placement == "append":
                return with_token(stream, arriving, axes)
            added = fit(arriving, stream, axes)
            return stream + (self.at_token(added, stream) if placement == "token" else added)

        return enter

    def at_token(self, added: Tensor, stream: Tensor) -> Tensor:
        """What is added to one position of the stream, of its shape: 0 at all but the target's token."""
        assert self.target.token is not None
        axis = positions_axis(self.anatomy.axes)
        count = stream.shape[axis]
        token = self.target.token % count
        return F.pad(added, [0, 0] * (stream.dim() - 1 - axis) + [token, count - 1 - token])

    def clean(self, model: nn.Module, labels: Tensor) -> Tensor:
        return self.table(model)[labels]

    def stand_in(self, inputs: Inputs) -> Tensor:
        first = next(iter(inputs.values()))
        return torch.zeros(len(first), dtype=torch.long, device=first.device)

    def losses(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), labels, reduction="none")
