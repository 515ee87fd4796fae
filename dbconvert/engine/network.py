"""A converted network that runs one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.engine.chunks import Measure, in_chunks
from dbconvert.engine.listening import CONTEXT, Arrival, listening
from dbconvert.engine.periphery import OwnPeriphery, check_keys, own_key
from dbconvert.engine.scores import applied, as_scores
from dbconvert.errors import DBConvertError
from dbconvert.graph.inject import PREFIX, Conditioning
from dbconvert.graph.looped import LoopPass, Memory
from dbconvert.graph.run import Run
from dbconvert.graph.two_streams import as_stream
from dbconvert.graph.values import as_taken
from dbconvert.plan import Plan
from dbconvert.tasks.base import Change as Acting
from dbconvert.tasks.base import Corruption, Inputs, Passage, Task, leaf

Periphery = Literal["shared", "own", "single"]
"""`shared`: one stem and readout for all blocks; `own`: each block has its own; `single`: only one block is
there, and the network's stem and readout are that block's."""


class Before(Protocol):
    """What happens before a block sees a batch: earlier blocks run, and say what it hears."""

    def __call__(self, network: BlockwiseNetwork, block: int, arrival: Arrival, labels: Tensor) -> Arrival: ...


class BlockwiseNetwork(nn.Module):
    """Wraps a converted network.

    Args:
        model: the network, injected.
        run: the handle that steers it.
        task: what x, y, z and the readout are; None while none is decided, when it can be written but not run.
        sigma_data: scale of the targets; set again when the noise is fitted.
        present: the blocks that are in memory.

    Attributes:
        rounds: how often a looped core runs unconditioned; None as often as the network says itself.
        backpropagate: how many rounds, the last ones, a training pass of it has gradients through; None all.
        predict: what a baseline predicts by, where that is not its output.
        walk: the outputs of its steps, where it takes some: from a draw of the generator, or from the mean.
        prelude: what the modules before a looped core gave, while that is kept.
        bring: makes sure that a block can run, where blocks are not always on the device.
        ran: the block that has just run.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        task: Task | None,
        plan: Plan,
        present: tuple[int, ...],
        periphery: Periphery,
    ) -> None:
        super().__init__()
        self.model = model
        self.run = run
        self.decided_task = task
        self.plan = plan
        self.present = present
        self.periphery = periphery
        self.sigma_data = plan.preview.sigma_data
        self.rounds: int | None = None
        self.backpropagate: int | None = None
        self.predict: Callable[[BlockwiseNetwork, Inputs], Tensor] | None = None
        self.walk: Callable[[BlockwiseNetwork, Inputs, torch.Generator | None], Iterator[Tensor]] | None = None
        self.prelude: Memory | None = None
        self.bring: Callable[[int], None] | None = None
        self.ran = 0

    @property
    def conditioning(self) -> Conditioning:
        conditioning: Conditioning = self.model.get_submodule(PREFIX)  # type: ignore[assignment]
        return conditioning

    @property
    def task(self) -> Task:
        if self.decided_task is None:
            raise DBConvertError("no task was decided for this network", hint="name one with --task")
        return self.decided_task

    # -- running ------------------------------------------------------------------------------------------

    def forward(
        self,
        block: int | None,
        inputs: Inputs,
        labels: Tensor,
        sigma: Tensor,
        eps: Tensor | None,
        layers: range | None = None,
        before: Before | None = None,
    ) -> Tensor:
        """One training pass: corrupts the targets of `labels` and lets `block` denoise them.

        Args:
            block: None runs `layers` unconditioned, for the baselines.
            inputs: arguments of the network, batch of N.
            labels: [N] or [N, S]. sigma: [N] or [N, S].
            eps: what the task drew; None gives a baseline its inputs as they are.
            before: what runs before the block.

        Returns:
            the losses, unweighted, of the labels' shape.
        """
        task, z = self.task, None
        ahead = task.lead
        hold: list[Tensor] | None = [] if task.text else None
        if eps is None:
            output, ahead = self.output(self.model_output(inputs, layers, hold)), task.ahead
        else:
            z = task.corrupt(self.model, labels, sigma, eps)
            if block is None:
                output = self.untold(inputs, z, sigma, layers, hold)
            else:
                arrival = Arrival(inputs, z, sigma)
                arrival = arrival if before is None else before(self, block, arrival, labels)
                z, sigma = arrival.z, arrival.sigma
                output = self.denoise(block, arrival.inputs, z, sigma, hold, arrival.heard)
        losses = task.losses(output, labels) if hold is None else self.held(block, hold[0], labels, task.losses, ahead)
        return losses if z is None else task.weighed(losses, z, sigma)

    def told(
        self,
        block: int,
        inputs: Inputs,
        labels: Tensor,
        z: Tensor,
        sigma: Tensor,
        measure: Measure,
        before: Before | None = None,
    ) -> Tensor:
        """What `measure` makes of one block's scores [..., K] and the labels, of the labels' shape.

        Args:
            z: noisy targets. sigma: [N] or [N, S]. before: what runs before the block.
        """
        hold: list[Tensor] | None = [] if self.task.text else None
        there = Arrival(inputs, z, sigma)
        there = there if before is None else before(self, block, there, labels)
        output = self.denoise(block, there.inputs, there.z, there.sigma, hold, there.heard)
        if hold is None:
            return measure(output, labels)
        return self.held(block, hold[0], labels, measure, self.task.lead)

    def held(self, block: int | None, features: Tensor, labels: Tensor, measure: Measure, ahead: int = 0) -> Tensor:
        """The same from what enters the head, [N, S, d], which tells labels so many positions ahead."""
        read = partial(self.read, block)
        kept = features[:, : labels.shape[1] - ahead]
        found = in_chunks(read, measure, kept, labels[:, ahead:], self.task.target.classes)
        return F.pad(found, (ahead, 0))

    def denoise(
        self,
        block: int,
        inputs: Inputs,
        z: Tensor,
        sigma: Tensor,
        hold: list[Tensor] | None = None,
        heard: Tensor | None = None,
        *,
        tells: bool = False,
    ) -> Tensor:
        """The output of one block for what reaches it, as `Arrival` has it; `hold` and `tells` as in `pass_through`."""
        passage = self.task.passage(self.model, block, inputs, self.corrupted(block, z, sigma))
        return self.pass_through(block, passage, hold, heard, tells=tells)

    def untold(
        self, inputs: Inputs, z: Tensor, sigma: Tensor, layers: range | None, hold: list[Tensor] | None = None
    ) -> Tensor:
        """The same of the unconditioned network: all layers, or only some of them, who are not told the level."""
        told = self.task.passage(self.model, 0, inputs, self.corrupted(0, z, sigma))
        passage = replace(told, condition=None, exit=None)
        return changed(self.output(self.model_output(passage.inputs, layers, hold, passage)), passage.result)

    def corrupted(self, block: int, z: Tensor, sigma: Tensor) -> Corruption:
        """Noisy targets as a block meets them."""
        if block not in self.present:
            raise DBConvertError(f"block {block} is not in memory", why=f"only blocks {list(self.present)} are")
        if self.bring is not None:
            self.bring(block)
        scaling = Preconditioning(self.sigma_data)
        level, own = self.task.c_noise(sigma, scaling), self.conditioning.embedder
        condition = own[str(block)](level) if str(block) in own else level
        return Corruption(z, sigma, condition, scaling)

    def pass_through(
        self,
        block: int,
        passage: Passage,
        hold: list[Tensor] | None = None,
        heard: Tensor | None = None,
        *,
        tells: bool = False,
    ) -> Tensor:
        """The network's output when one block runs as a task says.

        Args:
            hold: takes the features that enter the head, which gives nothing then.
            heard: what the block before delivers, as `delivered` gives it.
            tells: the next block will hear this one: `delivered` can be asked, and all that leaves the layers is made.
        """
        if heard is None and block > 0 and self.plan.context != "raw":
            raise DBConvertError(f"block {block} was given nothing to hear of block {block - 1}")
        self.run.reset()
        self.run.hold = hold
        self.run.keep = tells and self.plan.context == "features"
        self.run.active, self.ran = self.plan.layers_of(block), block
        passage.steer(self.run)
        if self.run.keep:
            self.run.last = None
        if heard is not None:
            hearing = self.conditioning.get_submodule(f"{CONTEXT}.{block}")
            self.run.entry = listening(hearing, heard, self.plan.anatomy.axes, passage.entry)
        if self.run.loop is not None:
            self.run.loop.memory = self.prelude
        return changed(self.output(self.call(block, passage)), passage.result)

    def delivered(self, expected: Tensor | None, z: Tensor, inputs: Inputs | None = None) -> Tensor | None:
        """What the block that has just run tells the next one, see `Arrival.heard`.

        Args:
            expected: the target that it expects, of the targets' shape; only `estimate` needs it.
            z: what it was given.
            inputs: likewise; of an image the stem makes a stream, for which it needs them.
        """
        if self.plan.context == "features":
            leaving: Tensor | None = self.run.leaving
            return None if leaving is None else leaving.detach()
        if self.plan.context == "raw" or expected is None:
            return None
        stem = self.task.stem_passage(self.model, self.ran, expected, inputs or {}, Preconditioning(self.sigma_data))
        if stem is not None:
            self.run.reset()
            self.run.active, self.run.keep = range(0), True
            with torch.no_grad():
                self.call(self.ran, stem)
            return self.run.leaving
        return as_stream(self.task.told(self.model, expected, z), self.plan.anatomy.axes)

    @contextmanager
    def prelude_kept(self) -> Iterator[None]:
        """Meanwhile the modules before a looped core run once: inputs must stay the same."""
        self.prelude = {}
        try:
            yield
        finally:
            self.prelude = None

    def plain(self, inputs: Inputs, layers: range | None = None) -> Tensor:
        """What the unconditioned network predicts: all layers, or only some of them."""
        if self.predict is not None:
            return self.predict(self, inputs)
        return self.task.plain(self.output(self.model_output(inputs, layers)))

    def model_output(
        self,
        inputs: Inputs,
        layers: range | None = None,
        hold: list[Tensor] | None = None,
        passage: Passage | None = None,
    ) -> Any:
        """All that the unconditioned network returns; `hold` as in `pass_through`."""
        if passage is None:
            passage = Passage(inputs) if self.decided_task is None else self.decided_task.plain_passage(inputs)
        self.run.reset()
        self.run.hold = hold
        self.run.active = layers
        passage.steer(self.run)
        self.run.loop = self.plain_loop()
        return self.model(**as_taken(passage.inputs, self.plan.anatomy.inputs))

    def plain_loop(self) -> LoopPass | None:
        """How a looped core runs unconditioned: blind rounds only where there would be gradients."""
        if self.plan.target is None or self.plan.target.loop is None:
            return None
        rounds = self.rounds or self.plan.anatomy.calls
        seen = self.backpropagate if self.training and torch.is_grad_enabled() else None
        return LoopPass(rounds=rounds, blind=0 if seen is None else max(0, rounds - seen))

    def call(self, block: int, passage: Passage) -> Any:
        instead = {**(self.own(block) if self.periphery == "own" else {}), **passage.instead}
        inputs = as_taken(passage.inputs, self.plan.anatomy.inputs)
        return torch.func.functional_call(self.model, instead, (), inputs) if instead else self.model(**inputs)

    def own(self, block: int) -> dict[str, Tensor]:
        """A block's own stem and readout, by the network's names."""
        found: dict[str, Tensor] = self.conditioning.get_submodule(f"periphery.{block}").tensors()  # type: ignore[operator]
        return found

    def read(self, block: int | None, features: Tensor) -> Tensor:
        """What the head, and what follows it, makes of features [..., d]: scores [..., K], or the logarithm of a
        softmax."""
        facts = self.plan.anatomy.head
        assert facts is not None
        head = self.model.get_submodule(facts.module)
        self.run.exit = self.run.hold = None
        if self.periphery == "own" and block is not None:
            prefix = facts.module + "."
            mine = {k.removeprefix(prefix): v for k, v in self.own(block).items() if k.startswith(prefix)}
            scores: Tensor = torch.func.functional_call(head, mine, (features,))
        else:
            scores = head(features)
        for change in facts.after:
            scores = applied(change, scores)
        return scores

    def output(self, value: Any) -> Tensor:
        """The scores, of a softmax its logarithm, or the image in what the network gives."""
        head, picture = self.plan.anatomy.head, self.plan.anatomy.picture
        if head is not None:
            return as_scores(head, leaf(value, head.output))
        if picture is None:
            raise DBConvertError("the network has no head to read")
        return leaf(value, picture.output)

    # -- weights ------------------------------------------------------------------------------------------

    def owner(self, key: str) -> int | None:
        """The block that a key of the network's state belongs to, None for the periphery."""
        if not key.startswith(PREFIX + "."):
            return self.plan.block_of_key(key)
        part, _, rest = key[len(PREFIX) + 1 :].partition(".")
        if part in ("embedder", "periphery", CONTEXT):
            return int(rest.split(".")[0])
        if part == "modulation":
            layer = int(rest.split(".")[0])
            return next(b for b in range(len(self.plan.blocks)) if layer in self.plan.layers_of(b))
        return self.task.block_of(f"{part}.{rest}")

    def tensors(self) -> dict[str, Tensor]:
        """Everything worth saving, by key; of tied parameters the first name only.

        A single block's stem and readout are named as its own, so that blocks can be put together.
        """
        tied = {name for group in self.plan.anatomy.tied for name in group[1:]}
        state = {k: v for k, v in self.model.state_dict(keep_vars=True).items() if k not in tied}
        if self.periphery == "own":
            return {k: v for k, v in state.items() if not self.is_template(k)}
        if self.periphery == "single":
            return {self.own_key(k) if self.is_template(k) else k: v for k, v in state.items()}
        return state

    def is_template(self, key: str) -> bool:
        """Whether a key is the network's own stem or readout, which blocks with their own do not use."""
        return not key.startswith(PREFIX + ".") and self.plan.block_of_key(key) is None

    def own_key(self, key: str) -> str:
        return own_key(self.present[0], key)

    def block_tensors(self, block: int) -> dict[str, Tensor]:
        return {k: v for k, v in self.tensors().items() if self.owner(k) == block}

    def periphery_tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.tensors().items() if self.owner(k) is None}

    def load(self, tensors: Mapping[str, Tensor], *, where: str) -> None:
        """Copies tensors into the network; every key it has must be there, and no other.

        Raises:
            DBConvertError: keys or shapes differ; the message names them.
        """
        own = self.tensors()
        check_keys(tensors, own, where)
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(tensors[key])

    def give_own_periphery(self, *, copied: bool = True) -> None:
        """Gives every block a copy of the stem and the readout; the network's own become a template.

        Args:
            copied: False leaves the copying of parameters to the caller.
        """
        names = {k: v for k, v in self.tensors().items() if self.is_template(k)}
        own = nn.ModuleDict({str(b): OwnPeriphery(names, copied=copied) for b in self.present})
        self.conditioning.add_module("periphery", own)
        self.periphery = "own"


def changed(output: Tensor, change: Acting | None) -> Tensor:
    return output if change is None else change(output)
