"""What a task answers. To add one: subclass Task in a file of its own and list it in registry.py.

Shapes: N examples, S positions, d width of the target. Labels are what a block is to tell: [N], or [N, S] where every
position has one, [N, S, L] where it has several, and losses have their shape; or images [N, C, H, W], with one loss an
example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy, Path
from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.masking import Masking
from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.graph.inject import PREFIX
from dbconvert.graph.looped import LoopPass
from dbconvert.graph.run import Filled, Run
from dbconvert.plan import Context, Entry, Kernel, NoiseRule, Readout, Rule, Table, Target
from dbconvert.recipe import Weight, Z

Change = Callable[[Tensor], Tensor]
Embed = Callable[[Tensor, Change], Tensor]
Inputs = dict[str, Tensor]
STEERS = ("condition", "same", "filled", "embed", "entry", "beside", "attention", "last", "leave", "exit", "loop")
"""What a passage tells the run."""


@dataclass(frozen=True)
class Corruption:
    """Noisy targets on their way into a block.

    Args:
        z: y + sigma eps, [N, d] or [N, S, d]; where tokens are masked, which are, [N, S].
        sigma: the level, [N], or [N, S] where every position has its own.
        condition: the embedded level, [*sigma, width]; c_noise itself, [*sigma], where nothing embeds it.
    """

    z: Tensor
    sigma: Tensor
    condition: Tensor
    scaling: Preconditioning


@dataclass(frozen=True)
class Passage:
    """What a task does at each point of one forward pass; `graph.run.Run` says where they are."""

    inputs: Inputs
    condition: Tensor | None = None
    same: Callable[[], int] | None = None
    filled: Filled | None = None
    embed: Embed | None = None
    entry: Change | None = None
    beside: Callable[[Path, Tensor], Tensor] | None = None
    attention: Callable[[object], AbstractContextManager[Any]] | None = None
    last: Callable[..., Any] | None = None
    leave: Change | None = None
    exit: Change | None = None
    loop: LoopPass | None = None
    result: Change | None = None
    """Changes what the network gives, once it has run."""
    instead: Mapping[str, Tensor] = field(default_factory=dict)
    """What stands in the place of parameters of the network, by name."""

    def steer(self, run: Run) -> None:
        for name in STEERS:
            setattr(run, name, getattr(self, name))


@dataclass(frozen=True)
class Headline:
    """A figure of evaluation by which trained networks are compared.

    Args:
        title: what it is.
        blocks: its name among the figures of a network in blocks.
        plain: the same of a baseline; None where that has none.
    """

    title: str
    blocks: str
    plain: str | None = None


class Task(ABC):
    """What x, y, z, readout, loss and metric are."""

    name: ClassVar[str]
    rule: ClassVar[Rule]
    """Default noise rule: `auto` for discrete targets, `edm` for continuous ones, `mask` for hidden tokens."""
    tables: ClassVar[tuple[Table, ...]] = ("fresh",)
    """The target tables it can use, the default first."""
    text: ClassVar[bool] = False
    """Whether its examples are tokens."""
    tagged: ClassVar[bool] = False
    """Whether its data has a label for every position."""
    ahead: ClassVar[int] = 0
    """How many positions before its label the unconditioned network tells it."""
    lead: ClassVar[int] = 0
    """How many positions before its label a block tells it."""
    looped: ClassVar[bool] = False
    """Whether it is for layers that run again and again, and only for those."""
    moves: ClassVar[tuple[int, ...]] = ()
    """Numbers of network evaluations that are worth a figure each, beside the default one."""
    tried: ClassVar[bool] = False
    """Whether it has to run a network, or its twin, to know that it fits."""
    bounded: ClassVar[bool] = False
    """Whether the mean of its losses over all levels bounds the likelihood, for the unconditioned network too."""
    denoiser: ClassVar[bool] = False
    """Whether baselines denoise too, at all levels; else they run on their inputs as these are."""
    generative: ClassVar[bool] = False
    """Whether it makes examples, and predicts nothing of those that it is given."""
    weight: ClassVar[Weight] = "none"
    """How losses are weighted unless a recipe says so."""
    aside: ClassVar[bool] = False
    """Whether padding has to be told from text by the batch: tokens before it could see it."""

    doubled: ClassVar[bool] = False
    """Whether clean and noisy positions run in one pass, by an attention of `kernel`."""

    kernel: Kernel = "auto"

    contexts: ClassVar[tuple[Context, ...]] = ("raw",)
    """What its blocks can be told of each other, what they are unless it is said first."""
    zs: ClassVar[tuple[Z, ...]] = ("noised",)
    """Where the noisy targets of its training can come from, likewise."""
    headlines: ClassVar[tuple[Headline, ...]] = (Headline("loss", "loss_zero", "loss"),)
    """What says how good a network is, the most telling first."""

    def __init__(self, anatomy: Anatomy, target: Target, noise: NoiseRule = NoiseRule()) -> None:
        self.anatomy = anatomy
        self.target = target
        self.noise = noise

    @property
    def evaluations(self) -> int | None:
        """Network evaluations of a prediction by default; None makes one more than blocks."""
        return None

    @property
    def masking(self) -> Masking:
        """The schedule by which tokens are hidden."""
        return self.noise.masking()

    # -- deciding -----------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def refusal(anatomy: Anatomy) -> str | None:
        """Why this task cannot use such a network; None if it can."""

    @staticmethod
    def on_request(anatomy: Anatomy) -> bool:
        """Whether a network that this task accepts is only given it when it is asked for by name."""
        return False

    @staticmethod
    @abstractmethod
    def decide(anatomy: Anatomy) -> Target:
        """The target for a network that the task accepts."""

    @staticmethod
    def learn(model: nn.Module, anatomy: Anatomy, target: Target) -> Target:
        """The target with what only running the network tells.

        Args:
            model: unconverted; it, or a twin of the same structure.

        Raises:
            Refused: it does not do what the task needs.
        """
        return target

    @staticmethod
    def place(
        target: Target, anatomy: Anatomy, model: nn.Module | None, entry: Entry | None, readout: Readout | None
    ) -> Target:
        """The target with where it enters and what is read, where the task leaves that open.

        Args:
            anatomy: of `model`.
            model: unconverted, or its twin; None where nothing can be tried.
            entry, readout: what was asked for.

        Raises:
            UsageError: it cannot be had.
        """
        if entry is not None or readout is not None:
            raise UsageError(
                "split.entry and split.readout say where a label enters, and the task has no choice there",
                hint="leave them out: they are for task classification",
            )
        return target

    # -- parameters ---------------------------------------------------------------------------------------

    @abstractmethod
    def register(self, model: nn.Module, *, blocks: int, width: int, seed: int) -> None:
        """Adds the task's own parameters to a converted network's conditioning."""

    @abstractmethod
    def block_of(self, key: str) -> int | None:
        """The block that owns a parameter that `register` added, None for the periphery."""

    def table(self, model: nn.Module) -> Tensor:
        """The targets as training uses them, [K, d], or [L, K, d] where a position has several labels."""
        raise self.without("table of targets")

    # -- a batch ------------------------------------------------------------------------------------------

    @property
    def read(self) -> tuple[str, ...]:
        """The network's arguments that the data has to give."""
        return tuple(given.name for given in self.anatomy.inputs)

    def arranged(self, inputs: Inputs, labels: Tensor) -> tuple[Inputs, Tensor]:
        """A batch of data as what goes into the network and what blocks are to tell.

        Args:
            labels: of the data, [N] or [N, S].
        """
        return inputs, labels

    def dropped(self, inputs: Inputs, share: float) -> Inputs:
        """Inputs of training without the class of some examples, a share drawn by chance."""
        return inputs

    # -- a forward pass -----------------------------------------------------------------------------------

    def target_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """Shape of the clean targets: [N, d] or [N, S, d]."""
        raise self.without("noisy target")

    def clean(self, model: nn.Module, labels: Tensor) -> Tensor:
        """Clean targets y, of `target_shape`."""
        raise self.without("noisy target")

    def c_noise(self, level: Tensor, scaling: Preconditioning) -> Tensor:
        """What the embedder is fed for a level, of its shape."""
        return scaling.c_noise(level)

    def level_shape(self, labels: Tensor) -> torch.Size:
        """Of the levels of a batch: [N], or [N, S] where every position has its own."""
        return labels.shape[:2] if self.noise.per == "position" else labels.shape[:1]

    def draw(
        self, inputs: Inputs, *, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Tensor:
        """The random numbers of a corruption."""
        return torch.randn(self.target_shape(inputs), generator=generator, device=device)

    def corrupt(self, model: nn.Module, labels: Tensor, level: Tensor, eps: Tensor) -> Tensor:
        """z, from what `draw` gave."""
        clean = self.clean(model, labels)
        return clean + along(level, clean) * eps

    def noisier(self, z: Tensor, level: Tensor, higher: Tensor, draw: Tensor, labels: Tensor) -> Tensor:
        """z at a higher level, as it was before it came to be what it is at this one: a Markov chain.

        The draw has to be a fresh one: with one shared by two levels, their z's tell y exactly.
        """
        return z + along((higher.square() - level.square()).clamp(min=0).sqrt(), z) * draw

    def handover(self, intervals: Intervals, block: int) -> float:
        """The level of a block's last evaluation before the next block's turn, at the sampler's usual steps."""
        return intervals.owned(block)[1]

    @abstractmethod
    def passage(self, model: nn.Module, block: int, inputs: Inputs, corruption: Corruption) -> Passage:
        """How a block denoises."""

    def plain_passage(self, inputs: Inputs) -> Passage:
        """How the unconditioned network runs."""
        return Passage(inputs)

    def denoised(self, model: nn.Module, output: Tensor) -> Tensor:
        """The network's output as an estimate of the clean target, of `target_shape`."""
        raise self.without("noisy target")

    def expected(self, model: nn.Module, scores: Tensor) -> Tensor:
        """The target that scores [N, S, K] speak of, [N, S, d]."""
        return self.denoised(model, scores)

    def told(self, model: nn.Module, expected: Tensor, z: Tensor) -> Tensor:
        """What the next block is told of an expected target: what it has beyond the mean, at unit scale, [N, S, d]."""
        raise self.without("estimate that blocks could be told")

    def stem_passage(
        self, model: nn.Module, block: int, expected: Tensor, inputs: Inputs, scaling: Preconditioning
    ) -> Passage | None:
        """A pass of the stem of an expected target, whose stream the next block hears; None where `told` says it."""
        return None

    # -- figures ------------------------------------------------------------------------------------------

    @abstractmethod
    def stand_in(self, inputs: Inputs) -> Tensor:
        """Labels of the right shape for a rehearsal."""

    @abstractmethod
    def losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Losses, unweighted, of the shape of the labels."""

    def weighed(self, losses: Tensor, z: Tensor, level: Tensor) -> Tensor:
        """Losses as training and evaluation count them, where that depends on the corruption."""
        return losses

    def plain(self, output: Tensor) -> Tensor:
        """What the unconditioned network predicts, in the places of the labels."""
        return output

    def placed(self, output: Tensor) -> Tensor:
        """What a block predicts, in the places of the labels."""
        return output

    @abstractmethod
    def correct(self, output: Tensor, labels: Tensor) -> Tensor:
        """Whether each label is met, bool, of the labels' shape."""

    def figures(self, output: Tensor, labels: Tensor) -> dict[str, float]:
        """More of how good predictions are, by name."""
        return {}

    @abstractmethod
    def probabilities(self, output: Tensor) -> Tensor:
        """Of every class; their sum over several draws of noise is an output that `correct` can be asked about."""

    def counted(self, labels: Tensor) -> Tensor:
        """Which labels count, as 0 and 1 of their shape."""
        return torch.ones(labels.shape, device=labels.device)

    def mean(self, values: Tensor, labels: Tensor) -> float:
        """Over all labels that count."""
        counted = self.counted(labels)
        return float((values * counted).sum() / counted.sum())

    def without(self, what: str) -> DBConvertError:
        return DBConvertError(f"task {self.name} has no {what}")


def conditioning(model: nn.Module) -> nn.Module:
    """What conversion added to a network."""
    return model.get_submodule(PREFIX)


def along(values: Tensor, like: Tensor) -> Tensor:
    """Values of the leading axes, as one an example, shaped to multiply `like`."""
    return values.reshape(values.shape + (1,) * (like.dim() - values.dim()))


def leaf(output: Any, path: tuple[int | str, ...]) -> Tensor:
    """The tensor at `path` of a network's output.

    Raises:
        DBConvertError: it is not there, as where a network returns something else in train mode.
    """
    found = output
    try:
        for key in path:
            found = found[key]
    except (KeyError, IndexError, TypeError):
        found = None
    if not isinstance(found, Tensor):
        where = f" with no tensor at {'.'.join(map(str, path))}" if path else ", not a tensor"
        raise DBConvertError(
            f"the network returns a {type(output).__name__}{where}: something else than when it was analysed",
            hint="let it return the same in train and in eval mode, e.g. the scores alone",
        )
    return found
