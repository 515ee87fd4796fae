"""What is DECIDED about a conversion: blocks, noise, target, conditioning. Frozen; plan.json is this.

A plan and the network's source are enough to convert the network again in another process.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dbconvert.anatomy import Anatomy, SideAxes
from dbconvert.conditioning.modulation import Curve, Start
from dbconvert.diffusion.distributions import LogNormal, NoiseDistribution, Tabulated
from dbconvert.diffusion.intervals import Intervals, Partition
from dbconvert.diffusion.masking import Masking, Schedule
from dbconvert.diffusion.predictions import Prediction
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.rounds import Loop
from dbconvert.schema import PositiveFloat, Share, identity, parse, read_json, record

SCHEMA_VERSION = 1
Rule = Literal["auto", "edm", "mask"]
Kernel = Literal["auto", "sdpa", "flex"]
"""What computes attention: FlexAttention, torch's own with a dense mask, or `auto`, the first where it can be compiled
on CUDA and the second elsewhere."""
Table = Literal["fresh", "own", "none"]
"""Where the clean targets come from: a new unit-norm table, or the network's own token embeddings, normalised; masked
tokens need none."""
Entry = Literal["replace", "token", "append", "add"]
"""Where a noisy label enters: in the place of the class token's own embedding, added to it, as one token more, or added
to every position."""
Readout = Literal["token", "pooled"]
"""What the head reads of the stream: the label's or class token, or what all (other) positions are pooled to."""
Context = Literal["raw", "features", "estimate"]
"""What a block is told of the one before it: nothing, the stream that left its layers, or what it expects the target to
be."""


@record
class SourceRef:
    """Where a network comes from.

    Args:
        kind: `model_file`, or the library whose configuration it is.
        name: the function, class or module in the file, or the architecture's class.
        location: what the user gave; for people only.
        files: the files that make it up, relative to their folder, the main one first.
        sha256: of their names and contents, or of the configuration.
        config: that configuration, which makes the source travel with the plan.
    """

    kind: Literal["model_file", "transformers", "diffusers"]
    name: str
    location: str
    files: tuple[str, ...]
    sha256: str
    config: dict[str, Any] | None = None


@record
class NoiseRule:
    """How noise levels are chosen; None leaves a figure to the rule.

    Args:
        rule: `auto` fits the distribution to the target table (posterior entropy); `edm` is the log-normal; `mask`
            hides tokens. None, in requests only, is the task's own.
        per: whether training draws a level for every example, or for every position of it, where each has a target.
        schedule, power: of `mask`, as `Masking` takes them; linear by default.
        refit: of `auto`, shares of the training after which the distribution is fitted again, to the network's own
            cross-entropy over sigma; all blocks have to train together.
    """

    rule: Rule | None = None
    partition: Partition = "equal-mass"
    overlap: float = 0.05
    p_mean: float | None = None
    p_std: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float | None = None
    per: Literal["example", "position"] = "example"
    schedule: Schedule | None = None
    power: PositiveFloat | None = None
    refit: tuple[Share, ...] = ()

    def masking(self) -> Masking:
        """The schedule of `mask`."""
        return Masking(self.schedule or "linear", self.power)


@record
class NoiseFit:
    """The noise that training and sampling use: noise.json.

    Args:
        basis: what it was fitted to, in words.
        boundaries: B + 1 ascending levels.
        log_sigma, mass: the fitted CDF (`auto`), empty for `edm`.
        p_mean, p_std: of the log-normal (`edm`).
        entropy: of the labels in nats (`auto`).
        sigma_data: scale of the targets; 1 where there is no noise to scale (`mask`).
        schedule, power: of `mask`.
    """

    rule: Rule
    basis: str
    boundaries: tuple[float, ...]
    overlap: float
    sigma_data: float
    log_sigma: tuple[float, ...] = ()
    mass: tuple[float, ...] = ()
    p_mean: float | None = None
    p_std: float | None = None
    entropy: float | None = None
    schedule: Schedule | None = None
    power: float | None = None

    @property
    def level(self) -> str:
        """What a level is called."""
        return "t" if self.rule == "mask" else "sigma"

    def distribution(self) -> NoiseDistribution:
        low, high = self.boundaries[0], self.boundaries[-1]
        if self.rule == "mask":
            return Masking(self.schedule or "linear", self.power)
        if self.rule == "auto":
            return Tabulated(self.log_sigma, self.mass, low, high)
        if self.p_mean is None or self.p_std is None:
            raise DBConvertError("an `edm` noise fit needs p_mean and p_std", hint="split the network again")
        return LogNormal(self.p_mean, self.p_std, low, high)

    def intervals(self) -> Intervals:
        return self._intervals

    @cached_property
    def _intervals(self) -> Intervals:
        return Intervals(self.distribution(), self.boundaries, self.overlap)

    @property
    def identity(self) -> str:
        return identity(self)


@record
class Target:
    """What the noisy target is and where it enters.

    Args:
        classes: of a label, and rows of its table; for images, rows of the network's own table of classes.
        width: its columns, the width of the stream; for images, their channels.
        placement: `replace` puts the noisy target in the place of one token's embedding, `token` adds it to that token,
            `append` makes it one token more, `add` adds it to every position; `positions` adds to every position one
            of its own; `sequence` gives every position one of its own, behind the clean ones; `mask` puts a learnt
            vector in a token's place; `state` makes it the state of a looped core; `image` puts the noisy image in the
            image's place.
        token: index of the token that the head reads.
        parameter: of `replace`, the parameter that is the token's embedding.
        readout: what the head reads, where that is a choice.
        table: where the clean targets come from.
        sides: axes of what the layers receive beside the stream, where the task has to change it.
        apart: whether masks can keep positions of other documents out of sight.
        halves: whether a block's last layer can run on its noisy half alone, of the clean one taking keys and values.
        loop: how a looped core is run once.
        prediction: of images, what the network predicts.
        labels: of a position, each with a table of its own; their embeddings are added up.
    """

    classes: int
    width: int
    placement: Entry | Literal["sequence", "positions", "mask", "state", "image"]
    token: int | None = None
    parameter: str | None = None
    readout: Readout | None = None
    table: Table = "fresh"
    sides: tuple[SideAxes, ...] = ()
    apart: bool = True
    halves: bool = False
    loop: Loop | None = None
    prediction: Prediction = Prediction()
    labels: int = 1


@record
class Plan:
    """A conversion, decided.

    Args:
        versions: of the libraries that wrote it.
        blocks: (first, last) layer of each block, both included; block 0 takes the highest noise.
        preview: the noise as far as it is known at the split (for `auto` without data: uniform labels).
        weights: what the weights are: `random, seed N` or the file they came from.
        pretrained: whether they were trained before.
        files: digest of each weights file of the package (`files.quick_digest`).
        shapes: shape of every tensor of the converted network.
        keys: what its weights files hold: the network's own tensors, or the source's as they were stored, which the
            source turns into the network's.
        context: what blocks are told of their predecessors; `raw` leaves them independent of each other.
        modulation: what follows the linear that makes shifts, scales and gates.
    """

    schema_version: int
    versions: dict[str, str]
    source: SourceRef
    anatomy: Anatomy
    blocks: tuple[tuple[int, int], ...]
    start: Start
    condition_width: int
    task: str | None
    target: Target | None
    noise: NoiseRule
    preview: NoiseFit
    weights: str
    pretrained: bool
    files: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    keys: Literal["network", "source"] = "network"
    context: Context = "raw"
    modulation: Curve = "linear"

    @property
    def identity(self) -> str:
        """Two packages with one identity are one split: same cut, same source, same weights."""
        return identity(self)

    def layers_of(self, block: int) -> range:
        first, last = self.blocks[block]
        return range(first, last + 1)

    def block_of_key(self, key: str) -> int | None:
        """The block that owns a parameter of the original network, None for the periphery."""
        layer = self.anatomy.layer_of(key)
        if layer is None:
            return None
        return next(b for b in range(len(self.blocks)) if layer in self.layers_of(b))


def cut(depth: int, *, blocks: int | None = None, sizes: tuple[int, ...] | None = None) -> tuple[tuple[int, int], ...]:
    """(first, last) of contiguous blocks over `depth` layers; sizes differ by at most one unless they are given.

    Raises:
        UsageError: more blocks than layers, or sizes that do not add up to the depth.
    """
    if sizes is None:
        count = blocks if blocks is not None else 1
        if count < 1:
            raise UsageError(f"{count} blocks: at least one is needed", hint="--blocks 1 trains the whole network")
        if count > depth:
            raise UsageError(
                f"{count} blocks cannot be cut from {depth} layers",
                hint=f"choose --blocks between 1 and {depth}",
            )
        small, larger = divmod(depth, count)
        sizes = tuple(small + (b < larger) for b in range(count))
    if any(size < 1 for size in sizes) or sum(sizes) != depth:
        raise UsageError(
            f"layers {','.join(map(str, sizes))} add up to {sum(sizes)}, but the stack has {depth}",
            hint="every layer belongs to exactly one block, and every block has at least one",
        )
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple((end - size, end - 1) for size, end in zip(sizes, ends, strict=True))


def read_plan(path: Path) -> Plan:
    return parse_plan(read_json(path), file=str(path))


def parse_plan(data: Any, *, file: str) -> Plan:
    """A plan from JSON.

    Raises:
        DBConvertError: it was written by a newer version.
        UsageError: it is not a plan.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise DBConvertError(
            f"this plan has schema version {version}, and this dbconvert reads up to {SCHEMA_VERSION}",
            where=file,
            hint="update dbconvert: pip install -U dbconvert",
        )
    return parse(Plan, data, file=file)
