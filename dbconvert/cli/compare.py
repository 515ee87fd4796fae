"""compare: the command that trains a grid of recipes and shows one table."""

from __future__ import annotations

from typing import Annotated

import typer

from dbconvert.errors import DBConvertError


def compare(
    target: Annotated[str, typer.Argument(help="A recipe, a package, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value: override a key of the recipe, in every cell.", metavar="[KEY=VALUE]..."),
    ] = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE,VALUE: a recipe key and its values; may be given again.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many, from the recipe's on.")] = 1,
    against: Annotated[
        list[str] | None, typer.Option(help="A baseline beside end-to-end and shallow control; may be given again.")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Part of the data; test by default.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder to work in; runs/NAME-compare by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells, run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train and evaluate a recipe with other settings, end-to-end and as the shallow control, in one table.

    The same command continues a comparison that was interrupted; finished cells are kept.
    """
    from dbconvert.cli import render
    from dbconvert.engine.compare import PICTURE, TABLE, plan_comparison, status
    from dbconvert.engine.compare import compare as run
    from dbconvert.engine.grid import Request, parse_vary

    if dry_run:
        request = Request(target, tuple(overrides or ()), parse_vary(vary or ()), seeds, tuple(against or ()), part)
        folder, planned = plan_comparison(request, out)
        render.show_cells([(one, status(folder, one.cell)) for one in planned], folder)
        return
    with render.progress() as report:
        found = run(
            target,
            vary=vary or (),
            seeds=seeds,
            against=against or (),
            overrides=overrides or (),
            part=part,
            out=out,
            report=report,
        )
    render.emit(found.data()) if as_json else render.show_comparison(found)
    if not as_json:
        render.say(f"wrote {found.folder / TABLE}, and the same as JSON and as a picture ({PICTURE})")
    if found.failed:
        raise DBConvertError(
            f"{len(found.failed)} of {len(found.rows)} cells failed", hint="the same command tries them again"
        )
