"""The training loop: one update is one block, one forward and one backward pass through its layers."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dbconvert.data.batches import OrderedBatches, block_order, derive, load_batches, seed_all
from dbconvert.data.examples import LABEL, Batch
from dbconvert.data.images import augmentation, entering
from dbconvert.diffusion.intervals import stratified
from dbconvert.engine.compiling import compiled_graphs
from dbconvert.engine.held import held
from dbconvert.engine.method import Job
from dbconvert.engine.metrics import Metrics, Scorer
from dbconvert.engine.refit import keep, points, refitted, told
from dbconvert.engine.runs import CHECKPOINTS, METRICS
from dbconvert.engine.state import Done, load_state, newest_state, save_state, truncate_metrics
from dbconvert.engine.units import Unit
from dbconvert.engine.watch import Watch
from dbconvert.events import Advance, Note, Reporter, Stage
from dbconvert.files import append_line
from dbconvert.graph.tape import as_written
from dbconvert.plan import NoiseFit
from dbconvert.tasks.base import Inputs


class Loop:
    """Trains a job from its newest state, or from the beginning, to its end."""

    def __init__(self, job: Job, accelerator: Accelerator, report: Reporter) -> None:
        self.job = job
        self.accelerator = accelerator
        self.report = report
        self.recipe = job.recipe
        self.metrics_path = job.folder / METRICS
        self.augment = augmentation(self.recipe.data)
        train = self.recipe.train
        self.order = block_order(list(job.units), job.steps, train.order, train.steps_per_turn, self.recipe.seed)
        self.model = self.prepare()
        self.updates = self.untimed = 0
        self.graphs = compiled_graphs() if self.recipe.train.compile else 0
        self.took: list[float] = []
        self.trained = 0.0
        every = self.recipe.eval.every
        self.evaluates_every = max(1, round(every * len(self.order))) if isinstance(every, float) else every
        late, told = self.accelerator.device.type == "cuda", job.layers is None
        self.watch = Watch(job.folder / CHECKPOINTS, late=late, told=told)
        shares = () if job.layers is not None else job.network.plan.noise.refit
        self.refits = points(shares, len(self.order))

    def prepare(self) -> nn.Module:
        """Moves the network to where accelerate wants it.

        Optimisers are not wrapped: what that adds, scaling of losses in fp16 and XLA, is not in use here.
        """
        mover = self.job.mover
        model = self.accelerator.prepare_model(self.job.network, device_placement=None if mover is None else False)
        if mover is not None:
            mover.begin(self.job.units, self.accelerator.device)
        prepared: nn.Module = model.train()
        return prepared

    # -- the whole run ------------------------------------------------------------------------------------

    def run(self) -> Metrics:
        """Trains to the end and returns the last evaluation."""
        self.resume()
        every = self.recipe.train.checkpoint_every
        self.report(Stage("training", len(self.order)))
        self.report(Advance(self.updates))
        self.started, self.counted, self.took = time.perf_counter(), 0, []
        self.begun = self.started
        for block, batch in zip(self.order[self.updates :], self.loaded(), strict=True):
            loss = self.update(block, batch)
            self.updates += 1
            self.report(Advance(1, {} if loss is None else {"loss": loss}))
            if self.updates in self.refits:
                self.refit()
            if self.evaluates_every and self.updates % self.evaluates_every == 0 and self.updates < len(self.order):
                self.evaluate()
            if every and self.updates % every == 0 and self.updates < len(self.order):
                self.save()
            self.report(Advance(0))
            self.timed()
        self.settle()
        return self.evaluate()

    def settle(self) -> None:
        """Waits for the updates that were asked of the device, and makes sure that their losses are finite."""
        self.watch.read()
        if self.untimed:
            seconds = (time.perf_counter() - self.begun) / self.untimed
            self.took.extend([seconds] * self.untimed)
            self.trained += seconds * self.untimed
            self.untimed = 0

    def timed(self) -> None:
        """What follows counts as time of the next update."""
        if not self.untimed:
            self.begun = time.perf_counter()

    def resume(self) -> None:
        state = newest_state(self.job.folder / CHECKPOINTS)
        if state is None:
            truncate_metrics(self.metrics_path, 0)
            return
        bring = (lambda _: None) if self.job.mover is None else self.job.mover.at_rest().activate_unit
        loaded = load_state(state, self.job.network, self.job.all_units(), bring)
        self.updates, self.trained = loaded.updates, loaded.seconds
        self.change_noise(loaded.noise)
        truncate_metrics(self.metrics_path, loaded.metrics_bytes)

    def save(self) -> None:
        self.settle()
        if self.job.mover is not None:
            self.job.mover.settle()
        if self.accelerator.is_main_process:
            size = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
            folder = self.job.folder / CHECKPOINTS
            done = Done(self.updates, self.trained, size)
            save_state(folder, self.job.network, self.job.all_units(), done, self.job.noise)
        self.accelerator.wait_for_everyone()

    def loaded(self) -> Iterator[Batch]:
        """Batches in order. An update's seed is set before its batch is read: the user's own dataset may draw too."""
        sampler = OrderedBatches(
            len(self.job.examples),
            self.recipe.train.batch,
            self.order,
            self.recipe.seed,
            start=self.updates,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        batches = iter(load_batches(self.job.examples, sampler, self.recipe.data.workers, self.accelerator.device))
        for block in self.order[self.updates :]:
            done = self.job.units[block].done
            seed_all(derive(self.recipe.seed, "update", block, done, self.accelerator.process_index))
            yield next(batches)

    # -- one update ---------------------------------------------------------------------------------------

    def update(self, block: int, batch: Batch) -> float | None:
        """One update of a block (and of the shared periphery); returns its mean unweighted loss.

        On a CUDA device that is None but for updates that are logged: nothing else waits for the device.
        """
        self.bring(block)
        unit, units = self.job.units[block], self.job.units_of(block)
        self.job.method.begin(self.job, block)
        for active in units:
            active.prepare_update()
        if not self.job.network.training:
            self.job.network.train()
        inputs, labels = self.to_device(batch)
        inputs = self.job.network.task.dropped(inputs, self.recipe.train.label_dropout)
        sigma = self.draw_sigma(block, labels)
        counted = self.job.network.task.counted(labels)
        total = counted.sum()
        losses = self.backward(block, inputs, labels, sigma, total)
        loss = (losses * counted).sum() / total
        self.watch.saw(unit, self.updates + 1, loss, losses, sigma)
        norm = self.clip(units)
        rate = unit.learning_rate()
        for active in units:
            active.optimizer.step()
        logged = (self.updates + 1) % self.recipe.log.every == 0 or self.updates + 1 == len(self.order)
        holds = held(self.job) if logged else {}
        for active in units:
            active.finish_update()
        self.counted += len(labels) * self.accelerator.num_processes
        self.untimed += 1
        if logged or not self.watch.late:
            self.settle()
        if logged:
            told = None if norm is None else float(norm)
            self.log(unit, {"block": block, "loss": float(loss), "lr": rate, "grad_norm": told}, holds)
        return None if self.untimed else float(loss)

    def bring(self, block: int) -> None:
        """Makes sure that the block that trains is on the device."""
        mover, order = self.job.mover, self.order
        if mover is not None and mover.active != block:
            later = range(self.updates + 1, len(order))
            mover.activate(block, next((order[i] for i in later if order[i] != block), None))

    def to_device(self, batch: Batch) -> tuple[Inputs, Tensor]:
        device = self.accelerator.device
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        labels = moved.pop(LABEL)
        image = self.recipe.data.image
        ready = {name: entering(value, image, self.augment) for name, value in moved.items()}
        return self.job.network.task.arranged(ready, labels)

    def draw_sigma(self, block: int, labels: Tensor) -> Tensor:
        """A level for every example, [N], or for every label, as the plan says."""
        shape = self.job.network.task.level_shape(labels)
        uniform = stratified(shape.numel()).view(shape)
        drawn = self.job.method.levels(self.job, block, labels, uniform)
        return drawn.to(self.accelerator.device, non_blocking=True)

    def backward(self, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor, total: Tensor) -> Tensor:
        """Accumulates the gradients of a batch, a part at a time; returns its unweighted losses.

        Args:
            total: the number of labels that count.
        """
        parts, method = self.recipe.train.accumulate, self.job.method
        losses = []
        size = -(-len(labels) // parts)
        for start in range(0, len(labels), size):
            chosen = slice(start, start + size)
            here = {name: value[chosen] for name, value in inputs.items()}
            held = self.accelerator.no_sync(self.model) if start + size < len(labels) else nullcontext()
            with held, nullcontext() if method.prepared else self.accelerator.autocast():
                found = method.learn(
                    self.job,
                    self.model,
                    block,
                    here,
                    labels[chosen],
                    sigma[chosen],
                    lambda loss: self.accelerator.backward(loss / total),
                )
            losses.append(found)
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    def clip(self, units: list[Unit]) -> Tensor | None:
        """Gradients shortened to the norm that the recipe allows; returns the norm that they had."""
        most = self.recipe.train.clip
        if most is None:
            return None
        parameters = [p for unit in units for p in unit.parameters.values()]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Below, torch would multiply all of them by 1; where nothing may wait for the device, let it.
        if self.watch.late or not float(norm) + 1e-6 <= most:
            clip_grads_with_norm_(parameters, most, norm)
        return norm

    # -- noise --------------------------------------------------------------------------------------------

    def refit(self) -> None:
        """Fits the noise to what the network has learnt; every process trains on with the same."""
        self.settle()
        before, rule = self.job.noise, self.job.network.plan.noise
        found: list[NoiseFit | None] = [None]
        if self.accelerator.is_main_process:
            with self.figures():
                found = [refitted(before, rule, self.scorer(), self.job.examples, self.updates)]
        after = broadcast_object_list(found)[0]
        self.change_noise(after)
        self.report(Note(told(before, after)))
        self.write({"update": self.updates, "boundaries": after.boundaries}, {})

    def change_noise(self, noise: NoiseFit) -> None:
        if noise != self.job.noise and self.accelerator.is_main_process:
            keep(self.job.folder, noise)
        self.job.noise = noise

    # -- figures ------------------------------------------------------------------------------------------

    def log(self, unit: Unit, values: dict[str, float | int | None], holds: Mapping[str, int]) -> None:
        elapsed = time.perf_counter() - self.started
        line = {
            "update": self.updates + 1,
            "unit_update": unit.done,
            **values,
            "seconds": round(statistics.median(self.took), 6),
            "examples_per_second": round(self.counted / elapsed, 1),
            "memory_mb": round(memory_mb(self.accelerator.device), 1),
            "trained": round(self.trained, 4),
            "holds": holds,
        }
        if self.recipe.train.compile:
            line["compiled_graphs"] = compiled_graphs() - self.graphs
        self.started, self.counted, self.took = time.perf_counter(), 0, []
        self.write(line, {f"{unit.name}/{k}": v for k, v in values.items() if k != "block" and v is not None})

    def evaluate(self) -> Metrics:
        """Figures on the validation part, none without one."""
        job = self.job
        if job.validation is None:
            return {}
        self.settle()
        with self.figures():
            found = self.scorer().score(job.validation, job.layers)
        if job.mover is not None:
            job.mover.dismiss()
        rounded = {name: round(value, 6) for name, value in found.items()}
        line = {"update": self.updates, "trained": round(self.trained, 4), "eval": rounded}
        self.write(line, {f"eval/{k}": v for k, v in found.items()})
        return found

    @contextmanager
    def figures(self) -> Iterator[None]:
        """Figures are computed in 32 bits where weights have as many, in training's mixed precision otherwise."""
        train = self.recipe.train
        cast = self.accelerator.autocast() if train.precision == "bf16-true" else nullcontext()
        with cast, as_written() if train.compile else nullcontext():
            yield

    def scorer(self) -> Scorer:
        return Scorer(
            network=self.job.network,
            intervals=self.job.intervals,
            options=self.recipe.eval,
            image=self.recipe.data.image,
            device=self.accelerator.device,
            seed=self.recipe.seed,
        )

    def write(self, line: dict[str, Any], tracked: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            append_line(self.metrics_path, json.dumps(line))
        self.accelerator.log(tracked, step=self.updates)


def memory_mb(device: torch.device) -> float:
    """Peak memory: of the device, or of the process where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
