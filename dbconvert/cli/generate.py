"""dbconvert generate: text from a trained network."""

from __future__ import annotations

from typing import Annotated

import typer


def generate(
    target: Annotated[str, typer.Argument(help="A run or a checkpoint.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="At most so many.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens of block 0 that count; 0 counts all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Share of block 0's likeliest tokens that counts.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Evaluations a token; one more than blocks by default.")] = None,
    cache: Annotated[bool, typer.Option(help="Keep keys and values of what is written.")] = True,
    model: Annotated[
        str | None, typer.Option(help="The network's model.py, where it is not beside the checkpoint.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise and of what is drawn.")] = 0,
) -> None:
    """Continue a text, one token at a time; masked_lm fills in what follows, in any order."""
    from dbconvert.cli import render
    from dbconvert.engine.generate import Decoding
    from dbconvert.engine.generate import generate as run
    from dbconvert.schema import parse

    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "steps": steps}
    decoding = parse(Decoding, asked, file="the command line")
    with render.progress() as report:
        pieces = run(
            target, prompt, tokens=tokens, decoding=decoding, cache=cache, seed=seed, model=model, report=report
        )
    typer.echo(prompt, nl=False)
    try:
        for piece in pieces:
            typer.echo(piece, nl=False)
    finally:
        typer.echo("")  # before an error too
