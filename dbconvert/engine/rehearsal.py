"""One update of some layers of a converted network, rehearsed: what autograd would keep of it, and no more.

On fake tensors it costs neither the memory nor the arithmetic of the real update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.engine.cascade import at_rest
from dbconvert.engine.listening import Arrival
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.on_policy import evaluated
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.graph.account import only_inputs_kept, saved_bytes
from dbconvert.graph.fake import NEEDS_NUMBERS, fake_like
from dbconvert.graph.parts import batched
from dbconvert.graph.proof import is_tokens
from dbconvert.graph.tape import tensors
from dbconvert.schema import Positive, record
from dbconvert.sources.fake_runs import runnable_on_fake
from dbconvert.tasks.base import Inputs

Precision = Literal["fp32", "bf16", "bf16-true"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-true": torch.bfloat16}


@record
class Case:
    """What is fed to the network.

    Args:
        batch: examples an update.
        length: tokens an example; None leaves the example input's, and there must be tokens otherwise.
        size: height and width of pictures; None leaves the example input's.
        precision: `bf16` is autocast, as in training: weights and their state stay in 32 bits. `bf16-true` computes
            likewise; the network's weights have to be in bf16.
    """

    batch: Positive = 8
    length: Positive | None = None
    size: Positive | None = None
    precision: Precision = "fp32"


class Rehearsal:
    """Counts what autograd keeps in an update of any run of layers; to be used in a `with`.

    Args:
        network: converted, as one block of all layers.
        example: arguments of its forward, batch first.
        fake: count on fake tensors; else on the network's own.
        device: where the network is; fake tensors are the CPU's.
    """

    def __init__(
        self,
        network: BlockwiseNetwork,
        example: dict[str, Any],
        case: Case,
        *,
        fake: bool = True,
        device: str = "cpu",
    ) -> None:
        self.network = network
        self.example = example
        self.case = case
        self.fake = fake
        self.device = device
        self.open = ExitStack()
        self.mode: Any = None

    def __enter__(self) -> Rehearsal:
        self.network.train()
        if self.fake:
            self.mode = self.open.enter_context(runnable_on_fake(self.network))
        self.open.enter_context(embeddings_in_range(self.network.model))
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def kept(
        self,
        layers: range | None,
        *,
        checkpointing: bool = False,
        whole: int | None = None,
        remakes: bool = False,
    ) -> int:
        """Bytes that autograd keeps when `layers` run conditioned; None runs all of them unconditioned, as end-to-end.

        Args:
            whole: the layer that is not checkpointed, as the one that is run again.
            remakes: conditioned values are made again for the backward pass.

        Raises:
            DBConvertError: the network fails on inputs of this size.
        """
        model, self.network.run.remakes = self.network.model, remakes
        active = layers if layers is not None else range(self.network.plan.anatomy.depth)
        paths = [self.network.plan.anatomy.layers[i].path for i in active if i != whole]
        marked = only_inputs_kept([model.get_submodule(path) for path in paths]) if checkpointing else nullcontext()
        with torch.random.fork_rng(devices=[]), marked:
            inputs = self.inputs()
            try:
                return saved_bytes(lambda: self.loss(layers, inputs), self.network.parameters())
            except NEEDS_NUMBERS as error:
                raise self.failed(error, "its forward pass depends on numbers") from error
            except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
                raise self.failed(error, str(error).strip().split("\n", 1)[0]) from error

    def update(self, layers: range | None, optimizer: torch.optim.Optimizer) -> float:
        """One real update on the network's own tensors; returns its loss."""
        loss = self.loss(layers, self.inputs())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def inputs(self) -> Inputs:
        resized = sized(self.example, self.case, self.mode)
        return {name: v.to(self.device) if isinstance(v, Tensor) else v for name, v in resized.items()}

    def failed(self, error: Exception, reason: str) -> DBConvertError:
        case = ", ".join(f"{k} {v}" for k, v in vars(self.case).items() if v is not None)
        return DBConvertError(f"the network fails at this size ({case})", why=reason, hint="choose another size")

    def loss(self, layers: range | None, inputs: Inputs) -> Tensor:
        autocast = torch.autocast(self.device, TYPES[self.case.precision], enabled=self.case.precision != "fp32")
        with autocast:
            return self.task_loss(layers, inputs) if self.network.decided_task else self.output_loss(layers, inputs)

    def as_block(self, layers: range) -> None:
        self.network.plan = replace(self.network.plan, blocks=((layers.start, layers.stop - 1),))

    def task_loss(self, layers: range | None, inputs: Inputs) -> Tensor:
        network, task = self.network, self.network.task
        labels = task.stand_in(inputs)
        sigma = torch.ones(task.level_shape(labels), device=self.device)
        eps = None
        if layers is not None:
            self.as_block(layers)
            eps = task.draw(inputs, device=torch.device(self.device))
        told = self.told if eps is not None and network.plan.context != "raw" else None
        losses: Tensor = network(None if eps is None else 0, inputs, labels, sigma, eps, before=told)
        return losses.mean()

    @staticmethod
    def told(network: BlockwiseNetwork, block: int, arrival: Arrival, _: Tensor) -> Arrival:
        """The block's own layers stand for those before it: what they deliver has the same shape."""
        with at_rest(network):
            said = evaluated(network, block, arrival)
            return replace(arrival, heard=network.delivered(said.expected, arrival.z, arrival.inputs))

    def output_loss(self, layers: range | None, inputs: Inputs) -> Tensor:
        """Of a network without a task: the cross-entropy of all it gives, or the square where it has no head."""
        network = self.network
        network.run.reset()
        if layers is not None:
            network.run.active = layers
            network.run.condition = network.conditioning.embedder["0"](torch.ones(self.case.batch, device=self.device))
        value = network.model(**inputs)
        if network.plan.anatomy.head is None:
            return first_floating(value).float().square().mean()
        scores = network.output(value).float().flatten(0, -2)
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=self.device))


def first_floating(value: Any) -> Tensor:
    return next(tensor for _, tensor in tensors(value) if tensor.is_floating_point())


# -- inputs -----------------------------------------------------------------------------------------------------


def sized(example: dict[str, Any], case: Case, mode: Any) -> Inputs:
    """The example input at another batch, length and size; floating ones are fake where there is a mode."""
    refuse_idle_options(example, case)
    return {name: at(value, case, mode) if batched(value, example) else value for name, value in example.items()}


def refuse_idle_options(example: dict[str, Any], case: Case) -> None:
    given = [value for value in example.values() if isinstance(value, Tensor)]
    if case.length is not None and not any(is_tokens(v) or v.dim() == 3 for v in given):
        raise UsageError("--length is for sequences, and the network takes none", hint="leave it out")
    if case.size is not None and not any(v.dim() == 4 for v in given):
        raise UsageError("--size is for pictures, and the network takes none", hint="leave it out")


def at(value: Tensor, case: Case, mode: Any) -> Tensor:
    shape = [case.batch, *value.shape[1:]]
    if case.length is not None and (is_tokens(value) or value.dim() == 3):
        shape[1] = case.length
    if case.size is not None and value.dim() == 4:
        shape[2:] = [case.size, case.size]
    if not value.is_floating_point():
        for axis, size in enumerate(shape):
            value = value.index_select(axis, torch.arange(size) % value.shape[axis])
        return value
    return torch.randn(shape, dtype=value.dtype) if mode is None else fake_like(mode, tuple(shape), value.dtype)


@contextmanager
def embeddings_in_range(model: nn.Module) -> Iterator[None]:
    """Fake tables look nothing up, so that numbers beyond their end would go unnoticed."""

    def check(module: nn.Embedding, args: tuple[Any, ...]) -> None:
        given = args[0] if args else None
        if isinstance(given, Tensor) and type(given) is Tensor and given.numel() and not given.is_meta:
            largest = int(given.max())
            if largest >= module.num_embeddings:
                raise IndexError(f"number {largest} is looked up in a table of {module.num_embeddings}")

    hooks = [m.register_forward_pre_hook(check) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
