"""sample: images from a trained network, every step of which runs one block, the only one on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from dbconvert.data.batches import derive
from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.sampling import Grid
from dbconvert.diffusion.solvers import Course, Solver, SolverName, solver
from dbconvert.engine.cascade import refuse_gaps
from dbconvert.engine.decode import opened_vae, pictures, with_vae
from dbconvert.engine.load import Loaded, load
from dbconvert.engine.mover import CPU, on_device
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.png import write_grid, write_png
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.events import Advance, Reporter, Stage, silent
from dbconvert.files import atomic_folder, refuse_occupied
from dbconvert.schema import Count, NotNegative, Positive, record, to_json
from dbconvert.tasks.base import Inputs
from dbconvert.tasks.image_diffusion import PICTURE_AXES, ImageDiffusion, spelled

GRID, SHEET = "grid.png", "samples.json"
PNG_CHANNELS = (1, 3)


@record
class Sampling:
    """How images are drawn.

    Args:
        steps: network evaluations an image; `heun` may use one less.
        grid: levels by EDM's eq. 5, or equally spaced in the noise's own mass.
        guidance: D = D_none + guidance (D_class - D_none), which doubles every evaluation; 1 is none, 0 draws
            without classes.
        batch: images that run together; it changes nothing but memory and time.
    """

    steps: Positive = 50
    sampler: SolverName = "euler"
    grid: Grid = "karras"
    guidance: NotNegative = 1.0
    batch: Positive = 64
    seed: Count = 0


@record
class Drawn:
    """One image: its file and its class."""

    file: str
    label: int | None


@record
class Samples:
    """What was drawn, and how: samples.json."""

    sampling: Sampling
    images: tuple[Drawn, ...]


def sample(
    target: str,
    *,
    out: str,
    count: int = 64,
    classes: tuple[int, ...] | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008
    model: str | None = None,
    vae: str | None = None,
    force: bool = False,
    report: Reporter = silent,
) -> Path:
    """Draws images and writes each as a PNG, all of them as one grid, and samples.json.

    Args:
        target: a checkpoint or a run, as `load` takes it; a baseline runs its whole network at every step.
        out: the folder; whole or not there at all.
        classes: which, in turn; all that the network was trained on by default.
        model: the network's Python file, where it does not lie beside the checkpoint.
        vae: that decodes latents, a folder or a hub id; by default the one of the run.
        force: replace a folder of samples that is already there.

    Raises:
        UsageError: the network makes no images, or not such ones.
        DBConvertError: it cannot be loaded, or makes numbers that are none.
    """
    refuse_occupied(Path(out), force=force)
    report(Stage("loading"))
    loaded = load(target, model)
    task = drawing_task(loaded, target)
    data = with_vae(loaded.data, target, vae)
    decoder = opened_vae(data, target, task.target.width)
    if decoder is None and task.target.width not in PNG_CHANNELS:
        raise UsageError(f"{target} makes {task.target.width} channels, and a PNG has 1 or 3")
    chosen = labels_of(task, classes, count, loaded.label_dropout, sampling.guidance)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drawn = draw(
        loaded.network, loaded.intervals, count, chosen, sampling, layers=loaded.layers, device=device, report=report
    )
    images = torch.cat(list(pictures(drawn, data, decoder, sampling.batch)))
    digits = max(4, len(str(count - 1)))
    names = [f"{i:0{digits}}.png" for i in range(count)]
    with atomic_folder(Path(out), force=force) as folder:
        for name, image in zip(names, images, strict=True):
            write_png(folder / name, image)
        write_grid(folder / GRID, images, columns_of(chosen, count))
        told = [None] * count if chosen is None else chosen.tolist()
        sheet = Samples(sampling, tuple(Drawn(name, label) for name, label in zip(names, told, strict=True)))
        (folder / SHEET).write_text(to_json(sheet), encoding="utf-8")
    return Path(out)


# -- what is asked for ------------------------------------------------------------------------------------------


def drawing_task(loaded: Loaded, target: str) -> ImageDiffusion:
    """The task of a network that makes images by itself.

    Raises:
        UsageError: it does not, it needs other inputs too, or blocks are missing.
    """
    network = loaded.network
    task = network.decided_task
    if not isinstance(task, ImageDiffusion):
        raise UsageError(f"{target} draws no images", hint="its task is not image_diffusion")
    if len(task.image_shape) != PICTURE_AXES:
        raise UsageError(
            f"{target} draws {spelled(task.image_shape)}, which are no pictures",
            hint="call dbconvert.engine.sample.draw from Python, or write a model.py whose forward takes pictures",
        )
    others = [name for name in task.read if name != task.picture.argument]
    if others:
        raise UsageError(
            f"the network also takes {', '.join(others)}, and sample has only noise, levels and classes to give",
            hint="call dbconvert.engine.sample.draw with more= from Python",
        )
    if loaded.layers is None and len(network.present) < len(network.plan.blocks):
        raise UsageError(f"{target} has only block {network.present[0]}", hint="assemble all blocks first")
    return task


def labels_of(
    task: ImageDiffusion, classes: tuple[int, ...] | None, count: int, dropout: float, guidance: float
) -> Tensor | None:
    """The class of every image, [count]; None where the network takes none.

    Args:
        dropout: with which the network was trained.

    Raises:
        UsageError: there is no such class, or no guidance.
    """
    if count < 1:
        raise UsageError(f"{count} images: at least one is needed")
    if not task.picture.labels:
        if classes is not None or guidance != 1:
            raise UsageError("the network takes no class, so that there is none to choose or to guide by")
        return None
    if guidance != 1 and not dropout:
        raise UsageError(
            "guidance needs a network that was trained without classes too, and this one was not",
            hint="train it with train.label_dropout=0.1, or leave guidance at 1",
        )
    known = task.target.classes - bool(dropout)
    wrong = [label for label in classes or () if not 0 <= label < known]
    if wrong or classes == ():
        asked = f"there is no class {wrong[0]}" if wrong else "no class was named"
        raise UsageError(asked, hint=f"classes: 0 to {known - 1}")
    given = torch.tensor(range(known) if classes is None else classes)
    return given[torch.arange(count) % len(given)]


def columns_of(labels: Tensor | None, count: int) -> int:
    """Of a grid: one a class where these are few, else as many as rows."""
    distinct = 0 if labels is None else len(set(labels.tolist()))
    return distinct if 1 < distinct <= 20 and distinct <= count else int(-(-(count**0.5) // 1))


# -- drawing ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(
    network: BlockwiseNetwork,
    intervals: Intervals,
    count: int,
    labels: Tensor | None,
    sampling: Sampling,
    *,
    layers: range | None = None,
    device: torch.device = CPU,
    more: Inputs | None = None,
    shape: tuple[int, ...] | None = None,
    report: Reporter = silent,
) -> Tensor:
    """Images in the network's own scale, [count, C, H, W] or [count, S, C], on the CPU.

    Image i is a function of the seed and i alone, whatever the batch. All images pass through one block before the
    next one is brought to the device.

    Args:
        labels: of the images, [count].
        layers: for a baseline, the layers that run at every level; None for blocks.
        more: what else the network takes, a row an image.
        shape: of an image; None for that of the example that the network was split with.
    """
    task = network.task
    assert isinstance(task, ImageDiffusion)
    way = solver(sampling.sampler, intervals.distribution, sampling.steps, sampling.grid)
    starts = noise(count, shape or task.image_shape, sampling)
    courses = [Course(start * intervals.boundaries[-1]) for start in starts]
    heard: list[Tensor | None] = [None] * len(courses)
    if layers is None:
        refuse_gaps(network, intervals, way.levels)
    runs = groupby(range(len(way.levels)), key=lambda i: 0 if layers is not None else intervals.block_of(way.levels[i]))
    report(Stage("drawing", len(way.levels) * len(courses)))
    was_training = network.training
    network.eval()
    with on_device(network, device, whole=layers is not None):
        for block, run in runs:
            evaluations = list(run)
            for index, course in enumerate(courses):
                first = index * sampling.batch
                rows = slice(first, first + len(course.z))
                given = {} if more is None else {k: v[rows].to(device) for k, v in more.items()}
                told, hears = (None if v is None else v.to(device) for v in (labels, heard[index]))
                guide = Guide(network, block, layers, given, None if told is None else told[rows], hears)
                courses[index] = guide.through(course, way, evaluations, sampling.guidance, device, report)
                heard[index] = guide.delivered()
    network.train(was_training)
    images = torch.cat([course.z for course in courses])
    if not images.isfinite().all():
        raise DBConvertError("the network draws numbers that are not finite", hint="train it longer, or with clipping")
    return images


def noise(count: int, shape: tuple[int, ...], sampling: Sampling) -> Iterator[Tensor]:
    """Unit noise in batches: every image has a generator of its own."""
    for first in range(0, count, sampling.batch):
        indices = range(first, min(first + sampling.batch, count))
        seeds = (torch.Generator().manual_seed(derive(sampling.seed, "image", index)) for index in indices)
        yield torch.stack([torch.randn(shape, generator=generator) for generator in seeds])


@dataclass
class Guide:
    """One block, or a baseline's layers, at a batch of images.

    Args:
        given: what the network takes beside image, time and class.
        labels: [N], None where the network takes none.
        heard: what the block before has delivered; under guidance of both halves.

    Attributes:
        said: by the last evaluation: D, and of what.
    """

    network: BlockwiseNetwork
    block: int
    layers: range | None
    given: Inputs
    labels: Tensor | None
    heard: Tensor | None = None
    said: tuple[Tensor, Tensor, Inputs] | None = None

    def delivered(self) -> Tensor | None:
        """What the next block hears, on the CPU."""
        heard = None if self.said is None else self.network.delivered(*self.said)
        return None if heard is None else heard.to(CPU)

    def through(
        self,
        course: Course,
        way: Solver,
        evaluations: list[int],
        guidance: float,
        device: torch.device,
        report: Reporter,
    ) -> Course:
        """The batch after these evaluations, on the CPU again."""
        there = Course(course.z.to(device), tuple(kept.to(device) for kept in course.kept))
        for evaluation in evaluations:
            there = way.move(there, evaluation, self.guided(there.z, way.levels[evaluation], guidance))
            report(Advance(1))
        return Course(there.z.to(CPU), tuple(kept.to(CPU) for kept in there.kept))

    def guided(self, z: Tensor, level: float, guidance: float) -> Tensor:
        """D, with classifier-free guidance (Ho & Salimans 2022) in one pass of twice the batch."""
        if guidance == 1 or self.labels is None:
            return self.denoised(z, self.labels, self.given, level)
        none = torch.full_like(self.labels, self.network.task.target.classes - 1)
        given = {name: torch.cat([value, value]) for name, value in self.given.items()}
        both = self.denoised(torch.cat([z, z]), torch.cat([self.labels, none]), given, level)
        told, untold = both.chunk(2)
        return untold + guidance * (told - untold)

    def denoised(self, z: Tensor, labels: Tensor | None, given: Inputs, level: float) -> Tensor:
        task = self.network.task
        assert isinstance(task, ImageDiffusion)
        inputs = {**given, task.picture.argument: z}
        if labels is not None:
            inputs.update(dict.fromkeys(task.picture.labels, labels))
        sigma = torch.full((len(z),), level, device=z.device)
        if self.layers is None:
            expected = self.network.denoise(self.block, inputs, z, sigma, heard=self.heard, tells=True)
            self.said = expected, z, inputs
            return expected
        return self.network.untold(inputs, z, sigma, self.layers)
