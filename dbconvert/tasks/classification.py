"""One label an example: y is the label's embedding, which enters as a noisy token or is added to the stream."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy
from dbconvert.conditioning.modulation import fit
from dbconvert.plan import Rule, Target
from dbconvert.tasks.base import Change, Corruption, Headline, Inputs, Passage, Task
from dbconvert.tasks.discrete import denoise_before_head, fresh_table, register_readouts, register_table


class Classification(Task):
    """Networks that map an input to one vector of class scores, with a linear head on features of the stream's width.

    Parameters it adds: `target.weight` [K, d], used L2-normalised so that embeddings cannot collapse, and for each
    block a linear from the conditioning to the shift and scale of the features before the head.
    """

    name: ClassVar[str] = "classification"
    rule: ClassVar[Rule] = "auto"
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
        if head.features != anatomy.width:
            return f"the head reads {head.features} features, the stream has {anatomy.width}"
        if head.outputs < 2:
            return "the head has a single output"
        return None

    @staticmethod
    def decide(anatomy: Anatomy) -> Target:
        head = anatomy.head
        assert head is not None
        if head.token is not None and len(anatomy.stream_shape) == 3:
            return Target(head.outputs, anatomy.width, "token", head.token)
        return Target(head.outputs, anatomy.width, "add")

    def register(self, model: nn.Module, *, blocks: int, width: int, seed: int) -> None:
        register_table(model, self.target, seed)
        register_readouts(model, blocks, width, self.target.width)

    def block_of(self, key: str) -> int | None:
        part, _, rest = key.partition(".")
        return int(rest.split(".")[0]) if part == "readout" else None

    def table(self, model: nn.Module) -> Tensor:
        return fresh_table(model)

    def target_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return len(next(iter(inputs.values()))), self.target.width

    def passage(self, model: nn.Module, block: int, inputs: Inputs, corruption: Corruption) -> Passage:
        leave = denoise_before_head(model, block, corruption, corruption.condition)
        return Passage(inputs, corruption.condition, entry=self.entry(corruption), exit=leave)

    def entry(self, corruption: Corruption) -> Change:
        scaled = corruption.z * corruption.scaling.c_in(corruption.sigma)[:, None]
        axes = self.anatomy.axes

        def enter(stream: Tensor) -> Tensor:
            arriving = fit(scaled, stream, axes)
            if self.target.placement == "token":
                arriving = arriving * self.token_mask(stream)
            return stream + arriving

        return enter

    def token_mask(self, stream: Tensor) -> Tensor:
        """1 at the target's token, 0 elsewhere, along the axis that is neither batch nor channel."""
        axes = self.anatomy.axes
        axis = next(i for i in range(stream.dim()) if i not in (axes.batch, axes.channel + stream.dim()))
        shape = [1] * stream.dim()
        shape[axis] = stream.shape[axis]
        place = torch.zeros(stream.shape[axis], dtype=stream.dtype, device=stream.device)
        place[self.target.token] = 1
        return place.view(shape)

    def clean(self, model: nn.Module, labels: Tensor) -> Tensor:
        return self.table(model)[labels]

    def denoised(self, model: nn.Module, output: Tensor) -> Tensor:
        return output.float().softmax(-1) @ self.table(model)

    def stand_in(self, inputs: Inputs) -> Tensor:
        first = next(iter(inputs.values()))
        return torch.zeros(len(first), dtype=torch.long, device=first.device)

    def losses(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), labels, reduction="none")

    def correct(self, output: Tensor, labels: Tensor) -> Tensor:
        return output.argmax(-1) == labels

    def probabilities(self, output: Tensor) -> Tensor:
        return output.float().softmax(-1)
