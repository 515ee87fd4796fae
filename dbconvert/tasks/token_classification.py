"""A label for every position: y is the labels' embeddings, whose noisy forms all positions see (a joint target).

Where every position has L labels, as in an output [N, S, L, K], y is the sum of their embeddings, each out of a table
of its own.

z [N, S, d] is added to the stream as it enters: c_in z, of unit scale, times the root mean square of the stream at that
position, so that neither drowns the other. Positions without a label have no z: nothing enters there, and D is c_out F.
Which these are is told by `ASKED` among the inputs, in training and evaluation from the labels of the data; without
it, as where a network is simply asked to predict, all positions have one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy
from dbconvert.data.examples import IGNORED
from dbconvert.errors import Refused
from dbconvert.graph.placing import made_up
from dbconvert.graph.two_streams import as_stream, positions_axis
from dbconvert.graph.untouched import no_fast_paths, unchanged_state
from dbconvert.plan import Context, Target
from dbconvert.recipe import Z
from dbconvert.tasks.base import Change, Corruption, Headline, Inputs, Passage, along
from dbconvert.tasks.discrete import above_mean, denoise_before_head, fresh_table
from dbconvert.tasks.labels import LabelTask, unfit

ASKED = "__asked__"
"""Key among the inputs of the positions that have labels, [N, S] bool; no argument of a network is called this."""


class TokenClassification(LabelTask):
    """Networks that end in a linear head over features of the stream's width at every position."""

    name: ClassVar[str] = "token_classification"
    tagged: ClassVar[bool] = True
    tried: ClassVar[bool] = True
    contexts: ClassVar[tuple[Context, ...]] = ("features", "estimate", "raw")
    zs: ClassVar[tuple[Z, ...]] = ("on-policy", "mixed", "noised")
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline("accuracy from z = 0", "accuracy_zero", "accuracy"),
        Headline("whole examples right", "accuracy_examples_zero", "accuracy_examples"),
        Headline("accuracy over draws", "accuracy_draw"),
    )

    # -- deciding -----------------------------------------------------------------------------------------

    @staticmethod
    def refusal(anatomy: Anatomy) -> str | None:
        head = anatomy.head
        if head is None:
            return "the network's output is not the result of one linear head"
        if head.pooled:
            return "the head reads one vector an example, not every position"
        if len(anatomy.stream_shape) != 3:
            return "the stream has other axes than examples, positions and channels"
        return unfit(head, anatomy.width)

    @staticmethod
    def on_request(anatomy: Anatomy) -> bool:
        """Networks of tokens whose head names other things than tokens are taken for this task unasked."""
        embedding, head = anatomy.embedding, anatomy.head
        return embedding is None or head is None or (head.classes == embedding.rows and head.labels == 1)

    @staticmethod
    def decide(anatomy: Anatomy) -> Target:
        assert anatomy.head is not None
        return Target(anatomy.head.classes, anatomy.width, "positions", labels=anatomy.head.labels)

    @staticmethod
    def learn(model: nn.Module, anatomy: Anatomy, target: Target) -> Target:
        """Raises Refused where the head does not read the stream's positions one by one."""
        given = made_up(anatomy)
        entered = features_before_head(model, anatomy, given)
        expected = [len(next(iter(given.values()))), positions_of(anatomy, given), anatomy.width]
        if list(entered.shape) != expected:
            raise Refused(
                f"the head reads features {list(entered.shape)}, and the stream's positions are {expected}: examples, "
                "positions, channels",
                node=anatomy.head.module if anatomy.head is not None else "",
                kind="positions",
                hint="a label for every position needs a head that reads each position of the stream",
            )
        return target

    # -- a batch ------------------------------------------------------------------------------------------

    def arranged(self, inputs: Inputs, labels: Tensor) -> tuple[Inputs, Tensor]:
        asked = (labels != IGNORED).view(*labels.shape[:2], -1).all(-1)
        return inputs if bool(asked.all()) else {**inputs, ASKED: asked}, labels

    # -- a forward pass -----------------------------------------------------------------------------------

    def target_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return len(next(iter(inputs.values()))), positions_of(self.anatomy, inputs), self.target.width

    def table(self, model: nn.Module) -> Tensor:
        rows, several = fresh_table(model), self.target.labels
        return rows if several == 1 else rows.view(several, -1, rows.shape[-1])

    def clean(self, model: nn.Module, labels: Tensor) -> Tensor:
        """Of the first class where there is no label: nobody sees it."""
        first = self.target.classes * torch.arange(self.target.labels, device=labels.device)
        rows = labels.clamp(min=0).view(*labels.shape[:2], -1) + first
        return fresh_table(model)[rows].sum(-2)

    def denoised(self, model: nn.Module, output: Tensor) -> Tensor:
        expected: Tensor = output.float().softmax(-1).flatten(2) @ fresh_table(model)
        return expected

    def told(self, model: nn.Module, expected: Tensor, z: Tensor) -> Tensor:
        return above_mean(expected, fresh_table(model), self.target.labels)

    def passage(self, model: nn.Module, block: int, inputs: Inputs, corruption: Corruption) -> Passage:
        asked, given = inputs.get(ASKED), own_inputs(inputs)
        z = corruption.z if asked is None else corruption.z * asked[..., None]
        there = Corruption(z, corruption.sigma, corruption.condition, corruption.scaling)
        leave = denoise_before_head(model, block, there, there.condition)
        return Passage(given, there.condition, entry=self.entry(there), exit=leave)

    def entry(self, corruption: Corruption) -> Change:
        """Adds c_in z at the scale of the stream, position by position."""
        axes, z = self.anatomy.axes, corruption.z
        arriving = as_stream(along(corruption.scaling.c_in(corruption.sigma), z) * z, axes)

        def enter(stream: Tensor) -> Tensor:
            loudness = stream.detach().float().square().mean(axes.channel, keepdim=True).sqrt()
            return stream + (loudness * arriving).to(stream.dtype)

        return enter

    def plain_passage(self, inputs: Inputs) -> Passage:
        return Passage(own_inputs(inputs))

    # -- figures ------------------------------------------------------------------------------------------

    def stand_in(self, inputs: Inputs) -> Tensor:
        first = next(iter(inputs.values()))
        several = () if self.target.labels == 1 else (self.target.labels,)
        shape = (len(first), positions_of(self.anatomy, inputs), *several)
        return torch.zeros(shape, dtype=torch.long, device=first.device)

    def losses(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.float().movedim(-1, 1), labels, ignore_index=IGNORED, reduction="none")

    def figures(self, output: Tensor, labels: Tensor) -> dict[str, float]:
        """`accuracy_examples`: the share of examples all of whose labels are met."""
        right = self.correct(output, labels) | (labels == IGNORED)
        return {"accuracy_examples": float(right.flatten(1).all(1).float().mean())}

    def counted(self, labels: Tensor) -> Tensor:
        return (labels != IGNORED).float()


def own_inputs(inputs: Inputs) -> Inputs:
    """The network's own."""
    return {name: value for name, value in inputs.items() if name != ASKED}


def positions_of(anatomy: Anatomy, inputs: Inputs) -> int:
    """Of the stream: as many as the first input is long that was as long as the stream when it was analysed, or as
    many as there were then."""
    seen = anatomy.stream_shape[positions_axis(anatomy.axes)]
    for given in anatomy.inputs:
        if given.name in inputs and len(given.shape) in (2, 3) and given.shape[1] == seen:
            return inputs[given.name].shape[1]
    return seen


def features_before_head(model: nn.Module, anatomy: Anatomy, inputs: Inputs) -> Tensor:
    """What enters the head of an unconverted network."""
    assert anatomy.head is not None
    found: list[Tensor] = []
    head = model.get_submodule(anatomy.head.module)
    hook = head.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        with unchanged_state(model), no_fast_paths(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(**inputs)
    finally:
        hook.remove()
    return found[0]
