"""A training loop whose pictures lie on the device, as bytes: cut out, augmented and normalised there, and its forward
and backward pass replayed as a CUDA graph.

It is dbconvert's own loop otherwise: order of examples, levels of noise, states and evaluation are those of
`dbconvert train`, and a run that was stopped goes on as it would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dbconvert.data.batches import OrderedBatches, derive, seed_all
from dbconvert.data.examples import LABEL, Batch
from dbconvert.data.images import normalise, unit
from dbconvert.engine.loop import Loop
from dbconvert.engine.units import Unit
from dbconvert.tasks.base import Inputs, along

WARM = 3
"""Passes before a capture, which choose kernels and fill the allocator."""
LOOK_EVERY = 20
"""Updates between looks at the loss: each waits for the device."""


class OutOfTime(Exception):
    """The run has saved its state, and goes on with `resume`."""


class DeviceLoop(Loop):
    """See the module.

    Args:
        deadline: time.monotonic() at which it stops.
        graphed: capture the passes.
        floor: the first batch again and again, without augmentation: what a step costs on data that is there.
    """

    deadline = float("inf")
    graphed = False
    floor = False

    def loaded(self) -> Iterator[Batch]:
        device, data = self.accelerator.device, self.job.examples.dataset  # type: ignore[attr-defined]
        self.argument = next(iter(self.job.examples.columns))  # type: ignore[attr-defined]
        images, labels = data.images.to(device), data.labels.to(device)
        self.graphs: dict[int, Captured] = {}
        self.still: tuple[Inputs, Tensor] | None = None
        self.rates: list[tuple[int, float]] = []
        sampler = OrderedBatches(len(labels), self.recipe.train.batch, self.order, self.recipe.seed, start=self.updates)
        for indices in sampler:
            chosen = torch.tensor(indices).to(device, non_blocking=True)
            yield {self.argument: images[chosen], LABEL: labels[chosen]}

    def to_device(self, batch: Batch) -> tuple[Inputs, Tensor]:
        if self.floor and self.still is not None:
            return self.still
        image = unit(batch[self.argument])
        image = image if self.floor else self.augment(image)
        self.still = {self.argument: normalise(image, self.recipe.data.image)}, batch[LABEL]
        return self.still

    def update(self, block: int, batch: Batch) -> float:
        """As the loop's own, without waiting for the device at every update."""
        if time.monotonic() > self.deadline:
            self.save()
            raise OutOfTime
        unit_ = self.job.units[block]
        units = [unit_, *([self.job.periphery] if self.job.periphery else [])]
        seed_all(derive(self.recipe.seed, "update", block, unit_.done, 0))
        for active in units:
            active.prepare_update()
        self.job.network.train()
        inputs, labels = self.to_device(batch)
        losses = self.backward(block, inputs, labels, self.draw_sigma(block, labels))
        if self.recipe.train.clip is not None:
            parameters = [p for active in units for p in active.parameters.values()]
            torch.nn.utils.clip_grad_norm_(parameters, self.recipe.train.clip)
        for active in units:
            active.optimizer.step()
            active.finish_update()
        return self.look(unit_, block, losses) if (self.updates + 1) % LOOK_EVERY == 0 else 0.0

    def look(self, unit_: Unit, block: int, losses: Tensor) -> float:
        loss = float(losses.mean())
        if not math.isfinite(loss):
            self.watch.saw(unit_, self.updates + 1, losses, torch.zeros_like(losses))
            self.watch.read()
        self.rates.append((self.updates + 1, time.perf_counter()))
        self.write({"update": self.updates + 1, "block": block, "loss": loss}, {})
        return loss

    def backward(self, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor) -> Tensor:
        if not self.graphed:
            return super().backward(block, inputs, labels, sigma)
        if block not in self.graphs:
            self.graphs[block] = Captured(self, block, inputs, labels, sigma)
        # passes before the capture have drawn numbers too, and would be others after a resume
        seed_all(derive(self.recipe.seed, "pass", block, self.job.units[block].done))
        return self.graphs[block](inputs, labels, sigma)

    @property
    def images_per_second(self) -> float:
        """Between the first look and the last one."""
        (first, begun), (last, ended) = self.rates[0], self.rates[-1]
        return (last - first) * self.recipe.train.batch / max(ended - begun, 1e-9)


class Captured:
    """Forward and backward pass of one block as a CUDA graph."""

    def __init__(self, loop: DeviceLoop, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.labels, self.sigma = labels.clone(), sigma.clone()
        unit_ = loop.job.units[block]
        units = [unit_, *([loop.job.periphery] if loop.job.periphery else [])]
        self.parameters = [p for active in units for p in active.parameters.values()]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                self.run(loop, block)
                self.forget()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = self.run(loop, block)
        self.gradients = [p.grad for p in self.parameters]
        self.forget()

    def run(self, loop: DeviceLoop, block: int) -> Tensor:
        """As `Loop.backward`, of a batch in one part."""
        loss, level = loop.losses(block, self.inputs, self.labels, self.sigma)
        loop.accelerator.backward((loss * along(loop.weight(level), loss)).mean())
        return loss.detach()

    def forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(self, inputs: Inputs, labels: Tensor, sigma: Tensor) -> Tensor:
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.labels.copy_(labels)
        self.sigma.copy_(sigma)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.losses


@contextmanager
def device_loop(**options: Any) -> Iterator[list[DeviceLoop]]:
    """Within, `dbconvert.train` uses this loop; gives the loops that it makes."""
    made: list[DeviceLoop] = []

    class Chosen(DeviceLoop):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            for name, value in options.items():
                setattr(self, name, value)
            made.append(self)

    with patch("dbconvert.engine.train.Loop", Chosen):
        yield made
