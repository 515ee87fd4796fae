"""A training loop whose pictures lie on the device, as bytes: cut out, augmented and normalised there, and its forward
and backward pass replayed as a CUDA graph.

It is dbconvert's own loop otherwise: order of examples, levels of noise, states and evaluation are those of
`dbconvert train`, and a run that was stopped goes on as it would have.
"""

from __future__ import annotations

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
from dbconvert.tasks.base import Inputs

WARM = 3
"""Passes before a capture, which choose kernels and fill the allocator."""


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
        self.captured: dict[int, Captured] = {}
        self.still: tuple[Inputs, Tensor] | None = None
        self.rates: list[tuple[int, float]] = []
        sampler = OrderedBatches(len(labels), self.recipe.train.batch, self.order, self.recipe.seed, start=self.updates)
        for block, indices in zip(self.order[self.updates :], sampler, strict=True):
            seed_all(derive(self.recipe.seed, "update", block, self.job.units[block].done, 0))
            chosen = torch.tensor(indices).to(device, non_blocking=True)
            yield {self.argument: images[chosen], LABEL: labels[chosen]}

    def to_device(self, batch: Batch) -> tuple[Inputs, Tensor]:
        if self.floor and self.still is not None:
            return self.still
        image = unit(batch[self.argument])
        image = image if self.floor else self.augment(image)
        self.still = {self.argument: normalise(image, self.recipe.data.image)}, batch[LABEL]
        return self.still

    def update(self, block: int, batch: Batch) -> float | None:
        """The loop's own; what is logged has waited for the device, so that its time counts."""
        if time.monotonic() > self.deadline:
            self.save()
            raise OutOfTime
        loss = super().update(block, batch)
        if loss is not None:
            self.rates.append((self.updates + 1, time.perf_counter()))
        return loss

    def backward(self, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor, total: Tensor) -> Tensor:
        if not self.graphed:
            return super().backward(block, inputs, labels, sigma, total)
        if block not in self.captured:
            self.captured[block] = Captured(self, block, inputs, labels, sigma, total)
        # passes before the capture have drawn numbers too, and would be others after a resume
        seed_all(derive(self.recipe.seed, "pass", block, self.job.units[block].done))
        return self.captured[block](inputs, labels, sigma)

    @property
    def images_per_second(self) -> float:
        """Between the first look and the last one."""
        (first, begun), (last, ended) = self.rates[0], self.rates[-1]
        return (last - first) * self.recipe.train.batch / max(ended - begun, 1e-9)


class Captured:
    """Forward and backward pass of one block as a CUDA graph, for batches of one size."""

    def __init__(
        self, loop: DeviceLoop, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor, total: Tensor
    ) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.labels, self.sigma, self.total = labels.clone(), sigma.clone(), total.clone()
        self.parameters = [p for unit in loop.job.units_of(block) for p in unit.parameters.values()]
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
        return Loop.backward(loop, block, self.inputs, self.labels, self.sigma, self.total)

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
