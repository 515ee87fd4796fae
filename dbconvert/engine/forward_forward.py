"""Forward-Forward (Hinton 2022, arXiv 2212.13345): each layer alone learns to tell right labels from wrong ones.

The label enters where the noisy one would, clean. A layer's goodness is the mean square of the stream that leaves it,
over positions and channels; the stream that enters is scaled to a root mean square of 1 at every position, so that no
layer reads the goodness of the one before. The loss of a layer is that of logistic classification,
log(1 + exp(threshold - goodness)) for the right label and log(1 + exp(goodness - threshold)) for a wrong one, drawn
uniformly. Gradients stay inside a layer (the stem learns with the first), and its activations go before the next one
runs. A prediction tries every label: the one with the most goodness, summed over all layers but the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.engine.layer_kinds import layer_kinds
from dbconvert.engine.method import Forward, Job, Method
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.errors import UsageError
from dbconvert.graph.greedy import layer_by_layer
from dbconvert.plan import Plan
from dbconvert.recipe import Recipe
from dbconvert.tasks.base import Inputs, Task

Take = Callable[[int, Tensor], None]
THRESHOLD = 2.0
"""Between the goodness of right and of wrong labels; that of a stream which a layer leaves as it is is 1."""
CLEAN = 1e-3
"""Level of a clean label, in units of sigma_data."""
EPSILON = 1e-6


class ForwardForward(Method):
    """All layers of the original network, each by a loss of its own; there is no readout to learn."""

    name = "forward-forward"
    labelled = True
    alone = True
    prepared = False

    def refuse(self, plan: Plan, recipe: Recipe) -> None:
        if any(layer.around is not None for layer in plan.anatomy.layers):
            raise UsageError(
                "train.method=forward-forward needs layers that are modules, and here their additions are written "
                "around them",
                hint="use train.method=end-to-end",
            )
        if recipe.train.checkpointing:
            raise UsageError(
                "train.checkpointing has no use in train.method=forward-forward: every layer's activations go before "
                "the next one runs",
                hint="leave it out",
            )

    def settle(self, network: BlockwiseNetwork, recipe: Recipe) -> None:
        network.predict = scores

    def parameters(self, network: BlockwiseNetwork) -> dict[str, nn.Parameter]:
        return without_readout(network.plan, super().parameters(network))

    def learn(
        self,
        job: Job,
        forward: Forward,
        block: int,
        inputs: Inputs,
        labels: Tensor,
        sigma: Tensor,
        backward: Callable[[Tensor], None],
    ) -> Tensor:
        return learn(job.network, inputs, labels, lambda losses: backward(losses.sum()))

    def passes(self, job: Job, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor) -> list[Callable[[], Tensor]]:
        """Of the first layer with the stem, or of any other."""
        kinds = layer_kinds(job.network.model, job.network.plan.anatomy)
        layers = {0, *{kind: layer for layer, kind in enumerate(kinds)}.values()}
        return [partial(lone_loss, job.network, inputs, labels, layer) for layer in sorted(layers)]

    def evaluations(self, task: Task, plan: Plan, recipe: Recipe) -> int:
        return task.target.classes


def without_readout(plan: Plan, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of stem and layers: no layer learns from what comes after it."""
    after = tuple(name + "." for name in plan.anatomy.readout.modules if name and name not in plan.anatomy.stem.modules)
    return {key: value for key, value in parameters.items() if not key.startswith(after)}


def learn(network: BlockwiseNetwork, inputs: Inputs, labels: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
    """One pass with right labels and wrong ones, [N]; every layer's loss goes `backward` as soon as it is there.

    Args:
        backward: is given the losses of one layer, [N].

    Returns:
        the mean of the layers' losses, [N].
    """
    found: list[Tensor] = []

    def take(_: int, goodness: Tensor) -> None:
        losses = layer_losses(goodness)
        backward(losses)
        found.append(losses.detach())

    run_both(network, inputs, labels, take)
    return torch.stack(found).mean(0)


def lone_loss(network: BlockwiseNetwork, inputs: Inputs, labels: Tensor, layer: int) -> Tensor:
    """The losses of one layer, [N], all others without gradients: what is kept for it is what an update keeps."""
    found: list[Tensor] = []

    def take(index: int, goodness: Tensor) -> None:
        if index == layer:
            found.append(layer_losses(goodness))

    with torch.set_grad_enabled(layer == 0):
        run_both(network, inputs, labels, take, lambda index: torch.set_grad_enabled(index == layer))
    return found[0]


def layer_losses(goodness: Tensor) -> Tensor:
    """[N] of the goodness of right labels and then of wrong ones, [2N]."""
    right, wrong = goodness.chunk(2)
    return F.softplus(THRESHOLD - right) + F.softplus(wrong - THRESHOLD)


@torch.no_grad()
def scores(network: BlockwiseNetwork, inputs: Inputs) -> Tensor:
    """The goodness of every label, summed over all layers but the first, [N, K]."""
    first = next(iter(inputs.values()))
    columns = []
    for label in range(network.task.target.classes):
        found: dict[int, Tensor] = {}
        run(network, inputs, torch.full((len(first),), label, device=first.device), found.__setitem__)
        heard = [goodness for layer, goodness in found.items() if layer or len(found) == 1]
        columns.append(torch.stack(heard).sum(0))
    return torch.stack(columns, 1)


# -- one pass ---------------------------------------------------------------------------------------------------


def run_both(
    network: BlockwiseNetwork, inputs: Inputs, labels: Tensor, take: Take, before: Callable[[int], object] | None = None
) -> None:
    """Right labels, and then wrong ones, as one batch of 2N."""
    classes = network.task.target.classes
    wrong = (labels + torch.randint(1, classes, labels.shape).to(labels.device)) % classes
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    run(network, twice, torch.cat([labels, wrong]), take, before)


def run(
    network: BlockwiseNetwork, inputs: Inputs, labels: Tensor, take: Take, before: Callable[[int], object] | None = None
) -> None:
    """One pass of all layers, unconditioned, with these labels.

    Args:
        take: is given each layer's number and its goodness, [N].
        before: is called before each layer.
    """
    model, axes = network.model, network.plan.anatomy.axes
    level = torch.full(labels.shape, CLEAN * network.sigma_data, device=labels.device)
    clean = network.task.clean(model, labels)
    scale = network.sigma_data * clean.shape[-1] ** 0.5  # of a unit vector: it enters with coordinates of about 1
    corruption = network.corrupted(0, scale * clean, level)
    passage = replace(network.task.passage(model, 0, inputs, corruption), condition=None, exit=None)

    def enter(index: int, stream: Tensor) -> Tensor:
        if before is not None:
            before(index)
        arriving = stream.detach() if index else stream
        square = arriving.float().square().mean(axes.channel, keepdim=True)
        return arriving * (square + EPSILON).rsqrt().to(arriving.dtype)

    def leave(index: int, stream: Tensor) -> None:
        take(index, stream.float().square().movedim(axes.batch, 0).flatten(1).mean(1))

    network.run.reset()
    passage.steer(network.run)
    with layer_by_layer(model, network.plan.anatomy, enter, leave):
        network.call(0, passage)
