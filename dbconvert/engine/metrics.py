"""How good a network is: from z = 0, over noise draws, block by block and at fixed noise levels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dbconvert.data.batches import Data, Spread, derive, in_order
from dbconvert.data.examples import LABEL
from dbconvert.data.images import entering
from dbconvert.data_options import ImageOptions
from dbconvert.diffusion.intervals import Intervals
from dbconvert.engine.bound import Bound
from dbconvert.engine.cascade import Cascade, at_rest, noised
from dbconvert.engine.denoising import Denoising, midpoints
from dbconvert.engine.evidence import Evidence
from dbconvert.engine.infer import Begin, ends, sample
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.shares import cross_entropies, entropy_shares
from dbconvert.recipe import EvalOptions
from dbconvert.tasks.base import Inputs

LARGEST_SCORES = 2**26
"""Scores of a batch that is evaluated, 256 MiB in 32 bits; a sampler holds a few times as many."""
Metrics = dict[str, float]


@dataclass(frozen=True)
class Scorer:
    """Evaluates one network; all figures are means over the examples.

    Args:
        seed: of the noise draws.
    """

    network: BlockwiseNetwork
    intervals: Intervals
    options: EvalOptions
    image: ImageOptions | None
    device: torch.device
    seed: int

    def score(self, examples: Data, layers: range | None = None) -> Metrics:
        """A network in blocks, or a baseline that runs `layers` unconditioned."""
        if self.options.examples:
            examples = Spread(examples, self.options.examples)
        with at_rest(self.network):
            if self.network.task.generative:
                sigmas, seed = self.options.sigmas, self.seed
                return Denoising(self.network, self.intervals, layers, sigmas, seed).measure(self.batches(examples))
            if self.network.task.bounded:
                return self.bound(examples, layers)
            if layers is not None and self.network.walk is None:
                return self.plain(examples, layers)
            return {**self.blocks(examples), **self.likelihood(examples)}

    def bound(self, examples: Data, layers: range | None) -> Metrics:
        """The evidence bound of masked tokens; a baseline serves all times."""
        intervals = self.intervals if layers is None else self.intervals.whole()
        evidence = Evidence(self.network, intervals, self.options.draws, self.seed, layers)
        per_token = getattr(examples, "characters_per_token", None) or 1.0
        return evidence.measure(self.batches(examples), per_token)

    def blocks(self, examples: Data) -> Metrics:
        """Metrics of a converted network.

        `accuracy_zero` and `loss_zero` start from z = 0, where `loss_first` and `accuracy_first` are what the first
        evaluation says, block 0 at sigma_max, and `loss_first_draw` and `accuracy_first_draw` the same from noise, over
        all draws; `accuracy_draw` is the mean over single noise draws and `accuracy_average` that of their averaged
        predictions; `loss_zero_after_n` and `loss_draw_after_n` are the losses after n evaluations, from z = 0 and from
        one draw; `loss_block_b` is the unweighted loss over the block's own levels, `loss_sigma_s` the one at a fixed
        level. Sampling needs all blocks; a single block has losses only.
        """
        totals: dict[str, float] = defaultdict(float)
        for index, (inputs, labels) in enumerate(self.batches(examples)):
            generator = torch.Generator().manual_seed(derive(self.seed, "eval", index))
            scores = self.losses(inputs, labels, generator) if self.network.walk is None else {}
            if len(self.network.present) == self.intervals.blocks:
                scores.update(self.predictions(inputs, labels, generator))
            for name, value in scores.items():
                totals[name] += value * len(labels)
        return {name: total / len(examples) for name, total in totals.items()}

    def likelihood(self, examples: Data) -> Metrics:
        """Of text: the bound of its likelihood, and the share of its entropy that each block resolves."""
        whole = len(self.network.present) == self.intervals.blocks
        if not (whole and self.network.task.text and self.options.draws):
            return {}
        per_token = getattr(examples, "characters_per_token", None)
        bound = Bound(self.network, self.intervals, self.options.draws, self.seed)
        ends = self.intervals.boundaries
        draws, seed = self.options.draws, self.seed
        at = cross_entropies(self.network, self.intervals, self.batches(examples), ends, draws=draws, seed=seed)
        return {**bound.measure(self.batches(examples), per_token), **entropy_shares(at)}

    def predictions(self, inputs: Inputs, labels: Tensor, generator: torch.Generator) -> Metrics:
        task, steps = self.network.task, self.options.steps
        first, last = self.sampled(inputs, steps)
        found = {
            "accuracy_zero": task.mean(task.correct(last, labels), labels),
            "loss_zero": task.mean(task.losses(last, labels), labels),
            "accuracy_first": task.mean(task.correct(first, labels), labels),
            "loss_first": task.mean(task.losses(first, labels), labels),
        }
        found.update({f"{name}_zero": value for name, value in task.figures(last, labels).items()})
        return {**found, **self.drawn(inputs, labels, generator), **self.after_moves(inputs, labels, generator)}

    def drawn(self, inputs: Inputs, labels: Tensor, generator: torch.Generator) -> Metrics:
        """Over all draws of noise, of which one is held at a time."""
        task, draws = self.network.task, self.options.draws
        totals: dict[str, float] = defaultdict(float)
        likely: Tensor | float = 0.0
        for _ in range(draws):
            first, last = self.sampled(inputs, self.options.steps, generator)
            totals["accuracy_first_draw"] += task.mean(task.correct(first, labels), labels)
            totals["loss_first_draw"] += task.mean(task.losses(first, labels), labels)
            totals["accuracy_draw"] += task.mean(task.correct(last, labels), labels)
            likely = likely + task.probabilities(last)
        found = {name: total / draws for name, total in totals.items()}
        if isinstance(likely, Tensor):
            found["accuracy_average"] = task.mean(task.correct(likely, labels), labels)
        return found

    def sampled(
        self, inputs: Inputs, steps: int | None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The outputs of the first and the last evaluation in the places of the labels, from z = 0, or from noise of
        the generator."""
        begin: Begin = "zero" if generator is None else "noise"
        outputs = (
            self.network.walk(self.network, inputs, generator)
            if self.network.walk is not None
            else sample(self.network, self.intervals, inputs, steps=steps, begin=begin, generator=generator)
        )
        first, last = ends(outputs)
        return self.network.task.placed(first), self.network.task.placed(last)

    def after_moves(self, inputs: Inputs, labels: Tensor, generator: torch.Generator) -> Metrics:
        """The loss after other numbers of evaluations than the default one, where the task asks for them."""
        task, found = self.network.task, {}
        for steps in task.moves:
            for begin, drawn in (("zero", None), ("draw", generator)):
                _, last = self.sampled(inputs, steps, drawn)
                found[f"loss_{begin}_after_{steps}"] = task.mean(task.losses(last, labels), labels)
        return found

    def losses(self, inputs: Inputs, labels: Tensor, generator: torch.Generator) -> Metrics:
        """The unweighted loss of each block over its own levels, and at fixed levels of equal mass between them."""
        distribution = self.intervals.distribution
        eps = self.network.task.draw(inputs, generator=generator).to(self.device)
        before = noised(self.network, self.intervals, generator)
        found = {}
        for block in self.network.present:
            low, high = distribution.cdf(torch.tensor(self.intervals.owned(block), dtype=torch.float64))
            sigma = distribution.icdf(low + midpoints(len(labels)) * (high - low))
            found[f"loss_block_{block}"] = self.loss_at(block, inputs, labels, sigma, eps, before)
        for level in distribution.icdf(midpoints(self.options.sigmas)).tolist():
            block = self.intervals.block_of(level)
            if block in self.network.present:
                sigma = torch.full((len(labels),), level)
                found[f"loss_sigma_{level:.4g}"] = self.loss_at(block, inputs, labels, sigma, eps, before)
        return found

    def loss_at(
        self, block: int, inputs: Inputs, labels: Tensor, sigma: Tensor, eps: Tensor, before: Cascade | None
    ) -> float:
        losses = self.network(block, inputs, labels, sigma.to(self.device, torch.float32), eps, before=before)
        return self.network.task.mean(losses, labels)

    def plain(self, examples: Data, layers: range) -> Metrics:
        """Accuracy, loss and what else the task counts, of the unconditioned network."""
        task = self.network.task
        totals: dict[str, float] = defaultdict(float)
        for inputs, labels in self.batches(examples):
            output = self.network.plain(inputs, layers)
            found = {
                "accuracy": task.mean(task.correct(output, labels), labels),
                "loss": task.mean(task.losses(output, labels), labels),
                **task.figures(output, labels),
            }
            for name, value in found.items():
                totals[name] += value * len(labels)
        return {name: total / len(examples) for name, total in totals.items()}

    def batches(self, examples: Data) -> Iterator[tuple[Inputs, Tensor]]:
        for loaded in in_order(examples, self.at_once(examples)):
            labels = loaded.pop(LABEL).to(self.device)
            ready = {name: entering(value.to(self.device), self.image) for name, value in loaded.items()}
            yield self.network.task.arranged(ready, labels)

    def at_once(self, examples: Data) -> int:
        """Examples a batch: as many as the options say, or as their scores leave room for."""
        scores = examples.__getitems__([0])[LABEL].numel() * self.network.task.target.classes
        return max(1, min(self.options.batch, LARGEST_SCORES // max(1, scores)))
