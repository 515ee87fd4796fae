"""dbconvert's commands. Each reads its options, calls one function, and renders the result.

torch and the engine are imported inside the commands, so that --help is quick.
"""

from __future__ import annotations

import gc
import sys
from typing import Annotated

import typer

from dbconvert.cli.compare import compare
from dbconvert.cli.failures import complain, unexpected
from dbconvert.cli.generate import generate
from dbconvert.cli.sample import sample
from dbconvert.cli.sizes import whole_numbers
from dbconvert.errors import DBConvertError

COLLECT = (100_000, 50, 50)
"""When Python looks for cyclic garbage. Its usual 700 new objects start it hundreds of times while torch and
Transformers are imported: 1.1 of 5.2 CPU seconds, and 1.4 more at the end (see `guarded`)."""

app = typer.Typer(
    name="dbconvert",
    help="Converts a residual network into DiffusionBlocks form and trains it one block at a time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs a third of the time
)

SOURCE = Annotated[
    str, typer.Argument(help="model.py, model.py:name, a folder of Transformers or diffusers, or a hub id")
]
STACK = Annotated[
    str | None,
    typer.Option(help="Path of the module that holds the layers, or PATH[a:b] for some of them."),
]
WEIGHTS = Annotated[str | None, typer.Option(help="Trained weights: safetensors, or a state_dict.")]
SEED = Annotated[int, typer.Option(help="Seed of the random initialisation.")]
TRUST = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that a Transformers folder or hub id brings.")
]
TASK = Annotated[str | None, typer.Option(help="What the network is for; inferred when only one fits.")]
DROP = Annotated[bool, typer.Option("--drop-extra", help="Leave out weights that the network does not have.")]
PROVE = Annotated[bool, typer.Option("--prove", help="Prove a large network on its own weights, whatever they take.")]
CONTEXT = Annotated[
    str | None,
    typer.Option(help="What a block hears of the one before it: raw, features or estimate; the task's own by default."),
]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
FORCE = Annotated[bool, typer.Option("--force", help="Replace what is there, if dbconvert wrote it.")]
OVERRIDES = Annotated[
    list[str] | None,
    typer.Argument(help="key=value: override a key of the recipe.", metavar="[KEY=VALUE]..."),
]


@app.command()
def inspect(
    source: SOURCE,
    stack: STACK = None,
    weights: WEIGHTS = None,
    seed: SEED = 0,
    trust_remote_code: TRUST = False,
    drop_extra: DROP = False,
    prove: PROVE = False,
    as_json: JSON = False,
) -> None:
    """Show what the analysis sees: stack, proof, branches, stem, readout; or why it refuses."""
    from dbconvert.cli import render
    from dbconvert.engine.opening import inspect as run

    with render.refusals(as_json=as_json), render.progress() as report:
        anatomy = run(
            source,
            stack=stack,
            weights=weights,
            seed=seed,
            trust=trust_remote_code,
            drop_extra=drop_extra,
            prove=prove,
            report=report,
        )
    render.emit(render.anatomy_json(anatomy)) if as_json else render.show_anatomy(anatomy)


@app.command()
def split(
    source: SOURCE,
    blocks: Annotated[int | None, typer.Option(help="How many blocks; 3 by default.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers of each block, e.g. 4,4,4.")] = None,
    layers_per_block: Annotated[int | None, typer.Option(help="Layers of every block but the last.")] = None,
    stack: STACK = None,
    task: TASK = None,
    data: Annotated[
        str | None, typer.Option(help="digits, pydoc, a hub id, a folder, text, parquet, or file.py:function.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="byte, char, or a Transformers folder or hub id.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens an example.")] = None,
    table: Annotated[str | None, typer.Option(help="Target table: own embeddings or fresh.")] = None,
    entry: Annotated[
        str | None, typer.Option(help="Where a noisy label enters: token, replace, append or add; found by default.")
    ] = None,
    readout: Annotated[str | None, typer.Option(help="What the head reads: token or pooled; found by default.")] = None,
    modulation: Annotated[str, typer.Option(help="linear, or silu as in the paper's code.")] = "linear",
    context: CONTEXT = None,
    prediction: Annotated[str | None, typer.Option(help="Of images: edm, epsilon, v or flow.")] = None,
    weights: WEIGHTS = None,
    noise: Annotated[str | None, typer.Option(help="auto, edm or mask; the task's own by default.")] = None,
    p_mean: Annotated[float | None, typer.Option(help="Mean of ln sigma (edm).")] = None,
    p_std: Annotated[float | None, typer.Option(help="Standard deviation of ln sigma (edm).")] = None,
    sigma_min: Annotated[float | None, typer.Option(help="Lowest noise level.")] = None,
    sigma_max: Annotated[float | None, typer.Option(help="Highest noise level.")] = None,
    sigma_data: Annotated[float | None, typer.Option(help="Scale of the targets.")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine or polynomial (mask).")] = None,
    power: Annotated[float | None, typer.Option(help="Of the polynomial schedule (mask).")] = None,
    partition: Annotated[str, typer.Option(help="equal-mass or uniform.")] = "equal-mass",
    overlap: Annotated[
        float, typer.Option(help="How far a block's training interval reaches into its neighbours.")
    ] = 0.05,
    condition_width: Annotated[int | None, typer.Option(help="Width of the conditioning vector.")] = None,
    start: Annotated[str | None, typer.Option(help="original or zero.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    seed: SEED = 0,
    trust_remote_code: TRUST = False,
    drop_extra: DROP = False,
    force: FORCE = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and show, write nothing.")] = False,
    prove: PROVE = False,
    as_json: JSON = False,
) -> None:
    """Cut a network into blocks and write a package that trains."""
    from dbconvert.cli import render
    from dbconvert.data_options import DataOptions
    from dbconvert.engine.split import split as run
    from dbconvert.plan import NoiseRule
    from dbconvert.recipe import SplitOptions
    from dbconvert.schema import parse

    options = {
        "blocks": blocks,
        "layers": whole_numbers(layers, "--layers"),
        "layers_per_block": layers_per_block,
        "stack": stack,
        "start": start,
        "condition_width": condition_width,
        "table": table,
        "entry": entry,
        "readout": readout,
        "modulation": modulation,
        "context": context,
        "prediction": prediction,
    }
    corpus = {"source": data, "tokenizer": tokenizer, "length": length}
    levels = {
        "rule": noise,
        "partition": partition,
        "overlap": overlap,
        "p_mean": p_mean,
        "p_std": p_std,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "sigma_data": sigma_data,
        "schedule": schedule,
        "power": power,
    }
    with render.refusals(as_json=as_json), render.progress() as report:
        result = run(
            source,
            out=out,
            options=parse(SplitOptions, options, file="the command line"),
            noise=parse(NoiseRule, levels, file="the command line"),
            task=task,
            data=None if data is None else parse(DataOptions, corpus, file="the command line"),
            weights=weights,
            seed=seed,
            trust=trust_remote_code,
            drop_extra=drop_extra,
            force=force,
            dry_run=dry_run,
            prove=prove,
            report=report,
        )
    render.emit(render.split_json(result)) if as_json else render.show_split(result)


@app.command()
def estimate(
    source: SOURCE,
    memory: Annotated[str | None, typer.Option(help="Of the device, e.g. 24GB (10^9 bytes) or 24GiB.")] = None,
    batch: Annotated[int, typer.Option(help="Examples an update.")] = 8,
    length: Annotated[
        int | None, typer.Option(help="Tokens an example; what positions reach, up to 1024, by default.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of pictures.")] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16 (autocast: weights stay in 32 bits), or bf16-true (weights in bf16 too).")
    ] = "fp32",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit or sgd.")] = "adamw",
    in_backward: Annotated[
        bool, typer.Option("--in-backward", help="As optimizer.in_backward frees gradients.")
    ] = False,
    recompute_modulation: Annotated[
        bool, typer.Option("--recompute-modulation", help="As train.recompute_modulation, without checkpointing.")
    ] = False,
    context: CONTEXT = None,
    task: TASK = None,
    stack: STACK = None,
    seed: SEED = 0,
    trust_remote_code: TRUST = False,
    drop_extra: DROP = False,
    everything: Annotated[bool, typer.Option("--all", help="Show every number of blocks.")] = False,
    as_json: JSON = False,
) -> None:
    """Show what each number of blocks would hold in memory and cost, and the fewest that fit."""
    from dbconvert.cli import render, render_estimate
    from dbconvert.cli.sizes import whole_bytes
    from dbconvert.engine.estimate import estimate as run
    from dbconvert.engine.estimate_records import Request
    from dbconvert.schema import parse

    options = {
        "memory": None if memory is None else whole_bytes(memory, "--memory"),
        "case": {"batch": batch, "length": length, "size": size, "precision": precision},
        "optimizer": optimizer,
        "in_backward": in_backward,
        "recompute_modulation": recompute_modulation,
        "context": context,
        "task": task,
    }
    request = parse(Request, options, file="the command line")
    with render.refusals(as_json=as_json), render.progress() as report:
        found = run(
            source,
            request=request,
            stack=stack,
            seed=seed,
            trust=trust_remote_code,
            drop_extra=drop_extra,
            report=report,
        )
    if as_json:
        render.emit(render_estimate.estimate_json(found))
    else:
        render_estimate.show_estimate(found, everything=everything)


@app.command()
def train(
    target: Annotated[str, typer.Argument(help="A recipe, a package, or the name of a shipped recipe.")],
    overrides: OVERRIDES = None,
    block: Annotated[int | None, typer.Option(help="Train this block alone.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest unfinished run of the target.")] = False,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder of the run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show cut, noise and memory, train nothing.")] = False,
) -> None:
    """Train the blocks of a network: all in one run, or one alone."""
    from dbconvert.cli import render
    from dbconvert.engine.outline import outline
    from dbconvert.engine.train import train as run

    with render.progress() as report:
        if dry_run:
            planned = outline(target, overrides=overrides or [], block=block, report=report)
        else:
            result = run(target, overrides=overrides or [], block=block, resume=resume, out=out, report=report)
    render.show_outline(planned) if dry_run else render.show_run(result)


@app.command()
def assemble(
    runs: Annotated[list[str] | None, typer.Argument(help="Runs; by default the newest complete one.")] = None,
    out: Annotated[
        str, typer.Option("--out", "-o", help="What to write: a file *.safetensors, or a folder.")
    ] = "model.safetensors",
    original: Annotated[
        bool, typer.Option("--original", help="Turn an untrained package back into the original network.")
    ] = False,
    force: FORCE = False,
) -> None:
    """Put trained blocks together into one safetensors checkpoint."""
    from dbconvert.cli import render
    from dbconvert.engine.assemble import assemble as run

    with render.progress() as report:
        path = run(runs or [], out=out, original=original, force=force, report=report)
    render.say(f"wrote {path}")


@app.command(name="eval")
def evaluate(
    target: Annotated[str, typer.Argument(help="A run or a checkpoint.")],
    overrides: OVERRIDES = None,
    part: Annotated[str | None, typer.Option(help="Part of the data; test by default.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The network's model.py, where it is not beside the checkpoint.")
    ] = None,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Evaluate a run or a checkpoint: from z = 0, over noise draws, block by block."""
    from dbconvert.cli import render
    from dbconvert.engine.evaluate import evaluate as run

    with render.progress() as report:
        result = run(target, part=part, model=model, overrides=overrides or [], seed=seed, report=report)
    render.emit(render.evaluation_json(result)) if as_json else render.show_evaluation(result)


@app.command()
def demo(
    seed: SEED = 0,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder to work in.")] = None,
    as_json: JSON = False,
) -> None:
    """Run the whole path on scikit-learn's digits and compare it with end-to-end training. Takes minutes."""
    from dbconvert.cli import render
    from dbconvert.engine.demo import demo as run

    with render.progress() as report:
        folder, rows = run(seed=seed, out=out, report=report)
    render.emit(render.demo_json(folder, rows)) if as_json else render.show_demo(folder, rows)


for command in (compare, generate, sample):
    app.command()(command)


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("dbconvert"))
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show Python's traceback of any failure.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    pass  # --debug is read by `main`, --version by its callback; both are here for --help


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 refused or failed with a message, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    # Taken out here, so that it may stand anywhere on the line.
    sys.exit(guarded([argument for argument in arguments if argument != "--debug"], debug=debug))


def guarded(arguments: list[str], *, debug: bool) -> int:
    """Runs a command and turns what it raises into a message and an exit code."""
    gc.set_threshold(*COLLECT)
    try:
        app(args=arguments, standalone_mode=True, prog_name="dbconvert")
    except SystemExit as end:
        return int(end.code or 0) if not isinstance(end.code, str) else 1
    except DBConvertError as error:
        if debug:
            raise
        complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        complain(
            DBConvertError("interrupted", hint="a run continues with --resume, a comparison with the same command")
        )
        return 1
    except Exception as error:
        if debug:
            raise
        complain(unexpected(error))
        return 1
    finally:
        gc.freeze()  # else Python walks through all of the libraries' objects once more before it ends
    return 0
