"""Recipes: strict YAML that says what to train, on what, and how. Dotted keys override single values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from dbconvert.conditioning.modulation import Curve, Start
from dbconvert.data_options import DataOptions
from dbconvert.diffusion.predictions import Predicted, Times
from dbconvert.errors import UsageError
from dbconvert.overrides import keys, merge, parse_overrides, without_displaced
from dbconvert.plan import Context, Entry, Kernel, NoiseRule, Readout, Table
from dbconvert.schema import Count, NotNegative, Positive, PositiveFloat, Share, parse, read_yaml, record

Method = Literal[
    "blocks", "end-to-end", "shallow", "truncated-bptt", "forward-forward", "noprop-dt", "badam", "lisa", "lora"
]
BACKPROPAGATE = 8
"""Rounds that `truncated-bptt` goes back by default, as the paper's baseline does."""
Z = Literal["noised", "on-policy", "mixed"]
MIXED = 0.5
Weight = Literal["none", "edm"]
Inactive = Literal["resident", "host", "disk"]
OptimizerName = Literal["adamw", "adamw8bit", "sgd"]


@record
class SplitOptions:
    """How a source is cut, where the recipe starts from a source and not from a package.

    Args:
        entry: where a noisy label enters; None leaves it to what the analysis finds.
        readout: what the head reads; None is what goes with the entry.
        modulation: `linear` is DiT's; `silu` puts SiLU behind it, as the paper's code does.
        context: what a block hears of the one before it; the task's own by default, see `Task.contexts`.
        prediction: what a network of images predicts: EDM's F, epsilon, v or a flow; `edm` by default, or what a
            pretrained diffusers folder says.
        times: the schedule that it was trained with.
    """

    blocks: Positive | None = None
    layers: tuple[int, ...] | None = None
    layers_per_block: Positive | None = None
    stack: str | None = None
    start: Start | None = None
    condition_width: Positive | None = None
    table: Table | None = None
    entry: Entry | None = None
    readout: Readout | None = None
    modulation: Curve = "linear"
    context: Context | None = None
    prediction: Predicted | None = None
    times: Times | None = None


@record
class OptimizerOptions:
    """Of every block (and of the shared periphery).

    Args:
        name: `adamw8bit` keeps AdamW's state in 8 bits, through torchao (extra `8bit`).
        in_backward: update a parameter as soon as its gradient is there, and free the gradient.
        warmup: how long the learning rate rises to `lr`: a share of the training (0.05), or so many updates a block,
            as a whole number (2500).
        final: the last learning rate as a share of `lr`.
    """

    name: OptimizerName = "adamw"
    in_backward: bool = False
    lr: PositiveFloat = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share | Positive = 0.05
    final: Share = 0.0


@record
class TrainOptions:
    """The training itself.

    Args:
        method: `blocks`, or a baseline on the same network: `end-to-end`, or `shallow`, which trains only the
            first block's layers, end-to-end, for B times the steps, a looped core once; or `truncated-bptt`, which
            trains a looped core end-to-end with gradients through its last rounds only; or `forward-forward`, in which
            every layer learns alone to tell right labels from wrong ones; or `noprop-dt`, in which every block learns
            alone to denoise the label at one level; or `badam` and `lisa`, which run all layers and train some of them,
            others every `steps_per_turn` updates; or `lora`, which trains low-rank additions to a pretrained network.
        steps: updates a block; or `epochs` over the training data a block. An override of one displaces the other.
        batch: examples an update, over all processes.
        order: which block is next: `random`; or `rotate`, `steps_per_turn` at a time; or `stagewise`, one block after
            the other, each to its end: a shared periphery is trained with the first and frozen then.
        after: where `--block` trains one that hears others, or whose z comes through them: finished runs of the blocks
            before it; by default the newest of this package under runs/.
        states: of such a block whose z are all on-policy: a folder to keep what the earlier ones bring to each example.
        periphery: `shared` trains stem, target table and readout with every block; `frozen-target` freezes a
            unit-norm table and gives each block its own stem and readout, so that blocks are independent.
        weight: `none` is the plain loss, `edm` multiplies it by w(sigma); by default the task's own, which is `edm`
            for images and `none` otherwise.
        attention: what computes attention over clean and noisy tokens: `sdpa` with a dense mask, `flex` (FlexAttention,
            on CUDA), or `auto`, which is `flex` on CUDA and `sdpa` elsewhere.
        z: `noised` is the truth with noise, as in the paper; `on-policy` what the sampler brings to a block, from its
            start through the earlier blocks, which run without gradient; `mixed` that for some examples of a batch. The
            task's own by default, see `Task.zs`.
        mixed: the share of `mixed` that is on-policy.
        label_dropout: the share of images that are trained on without their class, which guidance needs (0.1 in the
            paper); the last row of the network's table of classes stands for none.
        precision: `bf16` computes in bf16 and keeps weights in fp32; `bf16-true` keeps weights, gradients and moments
            in bf16 too, and rounds each update stochastically, through torchao (extra `8bit`).
        inactive: where blocks are that do not train (offloading): `resident` on the training device, `host` in the
            CPU's memory, `disk` in files of the run, mapped into memory. With `order=rotate` and many `steps_per_turn`
            they rarely move.
        prefetch: the next block is brought while the active one trains: the device holds two then.
        checkpointing: autograd keeps of each layer only what enters it, and runs it again for its backward pass.
        recompute_modulation: autograd keeps neither normed nor modulated values of a block, and makes them again.
        compile: torch.compile, a layer at a time.
        backpropagate: rounds that `truncated-bptt` goes back; 8 by default, or all where there are fewer.
        checkpoint_every: in updates of the whole run; 0 writes none.
    """

    method: Method = "blocks"
    steps: Positive | None = None
    epochs: Positive | None = None
    batch: Positive = 128
    order: Literal["random", "rotate", "stagewise"] = "random"
    after: tuple[str, ...] = ()
    states: str | None = None
    steps_per_turn: Positive = 1
    periphery: Literal["shared", "frozen-target"] = "shared"
    weight: Weight | None = None
    attention: Kernel = "auto"
    z: Z | None = None
    mixed: Share = MIXED
    label_dropout: Share = 0.0
    precision: Literal["fp32", "bf16", "bf16-true"] = "fp32"
    inactive: Inactive = "resident"
    prefetch: bool = False
    checkpointing: bool = False
    recompute_modulation: bool = False
    compile: bool = False
    accumulate: Positive = 1
    clip: PositiveFloat | None = 1.0
    backpropagate: Positive | None = None
    checkpoint_every: Count = 500
    cpu: bool = False


@record
class EvalOptions:
    """When and how to evaluate; `steps: null` samples with B + 1 network evaluations.

    `every` so many updates of the run, as a whole number, or once in such a share of them (0.05); 0 only at the end. Of
    the part at most so many `examples`, spread evenly over it; 0 is all of it.
    `draws` are those of a prediction, and the levels of each block in a bound of the likelihood.
    """

    every: Count | Share = 0
    examples: Count = 0
    batch: Positive = 256
    draws: Count = 8
    steps: Positive | None = None
    sigmas: Count = 8


@record
class SampleOptions(EvalOptions):
    """What `dbconvert eval` and `compare` can be asked beside: samples, and how good they are as text or as images.

    Args:
        samples: how many; of text, each continues the beginning of an example of the data.
        prompt, tokens: lengths of that beginning and of what follows, in tokens; half an example each by default.
        temperature, top_p: as `dbconvert generate` takes them.
        teacher: a causal language model that reads samples and data, a Transformers folder or hub id.
        mauve: a Transformers model whose features MAUVE compares, likewise.
        features: the network by whose features images are compared, see `dbconvert.engine.features`.
        guidance: of images by their classes, as `dbconvert sample` takes it; `steps` are 50 for images by default.
    """

    samples: Count = 0
    prompt: Positive | None = None
    tokens: Positive | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    teacher: str | None = None
    mauve: str | None = None
    features: str | None = None
    guidance: NotNegative = 1.0


def about_samples(options: SampleOptions) -> dict[str, Any]:
    """What is asked of samples, by key, with the value that asks for nothing."""
    default = SampleOptions()
    own = vars(SampleOptions)["__annotations__"]
    return {key: getattr(default, key) for key in own if getattr(options, key) != getattr(default, key)}


@record
class LogOptions:
    """Metrics go to metrics.jsonl every `every` updates, and to the trackers named."""

    every: Positive = 10
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    project: str = "dbconvert"


@record
class Recipe:
    """Everything a training run needs. Paths are relative to the recipe's file."""

    source: str | None = None
    package: str | None = None
    weights: str | None = None
    task: str | None = None
    split: SplitOptions = SplitOptions()
    noise: NoiseRule = NoiseRule()
    data: DataOptions = DataOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    train: TrainOptions = TrainOptions()
    eval: SampleOptions = SampleOptions()
    log: LogOptions = LogOptions()
    seed: int = 0


DECIDED = ("source", "weights", "split", "noise")
"""Keys that a package has settled: they are refused in its recipe and on the command line."""


def read_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe with `key=value` overrides applied.

    Raises:
        UsageError: an unknown key, a value of the wrong kind, an override that is not `key=value`.
    """
    data, places = read_yaml(path)
    given = parse_overrides(overrides)
    merged = merge(without_displaced(data, given), given)
    places.update(dict.fromkeys(keys(given), "the command line"))
    recipe = parse(Recipe, merged, file=str(path), places=places)
    check(recipe, str(path))
    return recipe


def check(recipe: Recipe, file: str) -> None:
    """What single values cannot say: keys that contradict each other."""
    if (recipe.source is None) == (recipe.package is None):
        raise UsageError("a recipe names either a source or a package", where=file)
    settled = [key for key in DECIDED if getattr(recipe, key) != getattr(Recipe(), key)]
    if recipe.package is not None and settled:
        raise UsageError(
            f"{settled[0]} was decided when the package was made",
            where=file,
            hint="split the source again with other options, or train from a recipe that names the source",
        )
    if recipe.train.steps is not None and recipe.train.epochs is not None:
        raise UsageError("train.steps and train.epochs are both given", where=file, hint="give one of them")
    if recipe.train.mixed != MIXED and recipe.train.z != "mixed":
        raise UsageError(
            f"train.mixed is the on-policy share of train.z=mixed, and train.z is {recipe.train.z or 'left open'}",
            where=file,
        )
    if recipe.train.backpropagate is not None and recipe.train.method != "truncated-bptt":
        raise UsageError(
            f"train.backpropagate is for train.method=truncated-bptt, not {recipe.train.method}", where=file
        )
    if recipe.train.prefetch and recipe.train.inactive == "resident":
        raise UsageError(
            "train.prefetch brings blocks that are away, and train.inactive is resident",
            where=file,
            hint="leave it out, or set train.inactive to host or disk",
        )
    if recipe.train.batch % recipe.train.accumulate:
        raise UsageError(
            f"train.batch {recipe.train.batch} is not a multiple of train.accumulate {recipe.train.accumulate}",
            where=file,
        )
    if recipe.train.recompute_modulation and recipe.train.checkpointing:
        raise UsageError(
            "train.recompute_modulation has nothing to add to train.checkpointing, which runs whole layers again",
            where=file,
            hint="leave one of them out",
        )
    check_optimizer(recipe, file)


def check_optimizer(recipe: Recipe, file: str) -> None:
    train, optimizer = recipe.train, recipe.optimizer
    if optimizer.in_backward and train.clip is not None:
        raise UsageError(
            f"optimizer.in_backward contradicts train.clip={train.clip:g}",
            where=file,
            why="the norm of all gradients is only known once the first ones have been used and freed",
            hint="add train.clip=null",
        )
    if optimizer.in_backward and train.accumulate > 1:
        raise UsageError(
            f"optimizer.in_backward contradicts train.accumulate={train.accumulate}",
            where=file,
            why="a gradient is used and freed before the next part of the batch could add to it",
            hint="leave one of them out; train.checkpointing=true saves activations too",
        )
    if train.precision == "bf16-true" and optimizer.name == "sgd":
        raise UsageError(
            "train.precision=bf16-true needs an optimiser that rounds stochastically, and optimizer.name=sgd rounds to "
            "the nearest",
            where=file,
            why="updates below half of a weight's last bit, 1/512 of it, would be lost",
            hint="use optimizer.name=adamw or adamw8bit, or train.precision=bf16",
        )
