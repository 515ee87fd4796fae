"""What has an optimiser of its own: a block, or the periphery that all blocks share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from dbconvert.recipe import OptimizerOptions


@dataclass
class Unit:
    """Parameters that are updated together.

    A unit is all that has to be on the training device while it trains; others may live elsewhere.

    Args:
        name: `block-0`, `periphery`, or `network` for a baseline.
        parameters: by key, all trainable.
        total: updates it will get.
        pace: updates it gets for one of a block.
        done: updates it has had.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    options: OptimizerOptions
    total: int
    pace: int = 1
    done: int = 0
    optimizer: Optimizer = field(init=False)

    def __post_init__(self) -> None:
        # One order, however the network registers them: norms are summed alike in single and joint runs.
        self.parameters = dict(sorted(self.parameters.items()))
        self.optimizer = make_optimizer(self.parameters, self.options)

    def learning_rate(self) -> float:
        return self.options.lr * schedule(self.done, self.total, self.options, self.pace)

    def prepare_update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()

    def finish_update(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1


def make_optimizer(parameters: Mapping[str, nn.Parameter], options: OptimizerOptions) -> Optimizer:
    """Vectors (norms, biases) are not decayed, as is usual."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.betas[0])
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)


def schedule(done: int, total: int, options: OptimizerOptions, pace: int = 1) -> float:
    """The learning rate of update `done` (from 0) as a share of its peak: a linear warm-up, then the decay.

    Args:
        pace: of the unit; a warm-up that is counted in updates is counted in those of a block.
    """
    warmup = options.warmup * pace if isinstance(options.warmup, int) else int(options.warmup * total)
    if done < warmup:
        return (done + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    progress = (done - warmup) / max(1, total - warmup)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if options.schedule == "cosine" else 1 - progress
    return options.final + (1 - options.final) * left
