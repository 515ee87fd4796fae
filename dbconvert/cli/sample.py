"""dbconvert sample: images from a trained network."""

from __future__ import annotations

from typing import Annotated

import typer

from dbconvert.cli.sizes import whole_numbers


def sample(
    target: Annotated[str, typer.Argument(help="A run or a checkpoint.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of PNG files.")] = "samples",
    count: Annotated[int, typer.Option(help="How many images.")] = 64,
    classes: Annotated[str | None, typer.Option(help="Which, in turn, e.g. 0,3,7; all by default.")] = None,
    guidance: Annotated[float, typer.Option(help="Of classes; 1 is none, 2 the paper's.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Network evaluations an image.")] = 50,
    sampler: Annotated[str, typer.Option(help="euler, heun or dpmpp-2m.")] = "euler",
    grid: Annotated[str, typer.Option(help="Levels: karras, or quantiles of the noise.")] = "karras",
    seed: Annotated[int, typer.Option(help="Of the noise; image i depends on it and on i alone.")] = 0,
    batch: Annotated[int, typer.Option(help="Images that run together.")] = 64,
    model: Annotated[
        str | None, typer.Option(help="The network's model.py, where it is not beside the checkpoint.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="What decodes latents, a folder or a hub id; the run's own by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there, if dbconvert wrote it.")] = False,
) -> None:
    """Draw images; every step runs one block, and no other has to be on the device."""
    from dbconvert.cli import render
    from dbconvert.engine.sample import Sampling
    from dbconvert.engine.sample import sample as run
    from dbconvert.schema import parse

    asked = {"steps": steps, "sampler": sampler, "grid": grid, "guidance": guidance, "batch": batch, "seed": seed}
    sampling = parse(Sampling, asked, file="the command line")
    chosen = None if classes is None else whole_numbers(classes, "--classes")
    with render.progress() as report:
        folder = run(
            target,
            out=out,
            count=count,
            classes=chosen,
            sampling=sampling,
            model=model,
            vae=vae,
            force=force,
            report=report,
        )
    render.say(f"wrote {count} images to {folder}/, all of them in grid.png")
