"""How good a network is: from z = 0, over noise draws, block by block and at fixed noise levels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dbconvert.data.batches import derive, in_order
from dbconvert.data.examples import LABEL, Examples
from dbconvert.data.images import normalise
from dbconvert.diffusion.intervals import Intervals
from dbconvert.engine.infer import sample
from dbconvert.engine.network import BlockwiseNetwork, Inputs
from dbconvert.recipe import EvalOptions, ImageOptions

Metrics = dict[str, float]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients meanwhile."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


def evaluate_blocks(
    network: BlockwiseNetwork,
    intervals: Intervals,
    examples: Examples,
    options: EvalOptions,
    image: ImageOptions | None,
    device: torch.device,
    seed: int,
) -> Metrics:
    """Metrics of a converted network, as means over all examples.

    `accuracy_zero` and `loss_zero` start from z = 0; `accuracy_draw` is the mean over single noise draws and
    `accuracy_average` that of their averaged predictions; `loss_block_b` is the unweighted loss over the block's
    own levels, `loss_sigma_s` the one at a fixed level. Sampling needs all blocks; a single block has losses only.
    """
    totals: dict[str, float] = defaultdict(float)
    with evaluating(network):
        for index, (inputs, labels) in enumerate(batches(examples, options.batch, image, device)):
            generator = torch.Generator().manual_seed(derive(seed, "eval", index))
            scores = block_losses(network, intervals, inputs, labels, options.sigmas, generator)
            if len(network.present) == intervals.blocks:
                scores.update(predictions(network, intervals, inputs, labels, options, generator))
            for name, value in scores.items():
                totals[name] += value * len(labels)
    return {name: total / len(examples) for name, total in totals.items()}


def predictions(
    network: BlockwiseNetwork,
    intervals: Intervals,
    inputs: Inputs,
    labels: Tensor,
    options: EvalOptions,
    generator: torch.Generator,
) -> Metrics:
    task = network.task
    last = sample(network, intervals, inputs, steps=options.steps)[-1]
    found = {"accuracy_zero": mean(task.correct(last, labels)), "loss_zero": mean(task.losses(last, labels))}
    draws = [
        sample(network, intervals, inputs, steps=options.steps, begin="noise", generator=generator)[-1]
        for _ in range(options.draws)
    ]
    if draws:
        found["accuracy_draw"] = sum(mean(task.correct(draw, labels)) for draw in draws) / len(draws)
        found["accuracy_average"] = mean(task.correct(task.average(draws), labels))
    return found


def block_losses(
    network: BlockwiseNetwork,
    intervals: Intervals,
    inputs: Inputs,
    labels: Tensor,
    fixed: int,
    generator: torch.Generator,
) -> Metrics:
    """The unweighted loss of each block over its own levels, and at `fixed` levels of equal mass between them."""
    width = network.task.target.width
    eps = torch.randn(len(labels), width, generator=generator).to(labels.device)
    found = {}
    for block in network.present:
        low, high = intervals.distribution.cdf(torch.tensor(intervals.owned(block), dtype=torch.float64))
        shares = (torch.arange(len(labels), dtype=torch.float64) + 0.5) / len(labels)
        sigma = intervals.distribution.icdf(low + shares * (high - low)).float().to(labels.device)
        found[f"loss_block_{block}"] = loss_at(network, block, inputs, labels, sigma, eps)
    quantiles = (torch.arange(fixed, dtype=torch.float64) + 0.5) / max(1, fixed)
    for level in intervals.distribution.icdf(quantiles).tolist():
        block = intervals.block_of(level)
        if block in network.present:
            sigma = torch.full((len(labels),), level, device=labels.device)
            found[f"loss_sigma_{level:.4g}"] = loss_at(network, block, inputs, labels, sigma, eps)
    return found


def loss_at(
    network: BlockwiseNetwork, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor, eps: Tensor
) -> float:
    return mean(network.task.losses(network(block, inputs, labels, sigma, eps), labels))


def evaluate_plain(
    run: Callable[[Inputs], Tensor],
    network: BlockwiseNetwork,
    examples: Examples,
    options: EvalOptions,
    image: ImageOptions | None,
    device: torch.device,
) -> Metrics:
    """Accuracy and loss of an unconditioned network (the baselines)."""
    right = lost = 0.0
    with evaluating(network):
        for inputs, labels in batches(examples, options.batch, image, device):
            output = run(inputs)
            right += float(network.task.correct(output, labels).sum())
            lost += float(network.task.losses(output, labels).sum())
    return {"accuracy": right / len(examples), "loss": lost / len(examples)}


def batches(
    examples: Examples, batch: int, image: ImageOptions | None, device: torch.device
) -> Iterator[tuple[Inputs, Tensor]]:
    for loaded in in_order(examples, batch):
        labels = loaded.pop(LABEL).to(device)
        yield {name: normalise(value.to(device), image) for name, value in loaded.items()}, labels


def mean(values: Tensor) -> float:
    return float(values.float().mean())
