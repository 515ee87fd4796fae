"""What has an optimiser of its own: a block, or the periphery that all blocks share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from dbconvert.engine.optimizers import make_optimizer, step_in_backward
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
        if self.options.in_backward:
            for parameter in self.parameters.values():
                parameter.register_post_accumulate_grad_hook(self.step_in_backward)  # type: ignore[no-untyped-call]

    def learning_rate(self) -> float:
        return self.options.lr * schedule(self.done, self.total, self.options, self.pace)

    def prepare_update(self) -> None:
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step_in_backward(self, parameter: nn.Parameter) -> None:
        step_in_backward(parameter, self.optimizer)

    def finish_update(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        self.done += 1


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
