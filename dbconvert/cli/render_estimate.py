"""Drawing what `estimate` found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from dbconvert.amounts import size
from dbconvert.cli.render import grid, out

if TYPE_CHECKING:
    from dbconvert.engine.estimate_records import Advice, Estimate, Row
    from dbconvert.engine.holdings import Holding

SHORT = 16
"""Up to so many layers every number of blocks is shown."""
ALWAYS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def estimate_json(found: Estimate) -> dict[str, Any]:
    from dbconvert.schema import to_data

    return {
        "network": found.network,
        "task": found.task,
        "layers": found.depth,
        **{key: to_data(value) for key, value in vars(found.request).items() if key not in ("context", "task")},
        "rows": [row_json(row, found) for row in found.rows],
        "smallest": [{**to_data(setting), "blocks": blocks} for setting, blocks in found.smallest.items()],
        "best": None if found.best is None else {"blocks": found.best[0], **to_data(found.best[1])},
        "evidence": list(found.evidence),
        "advice": to_data(found.advice),
        "notes": list(found.notes),
    }


def row_json(row: Row, found: Estimate) -> dict[str, Any]:
    from dbconvert.schema import to_data

    held = [
        {**to_data(setting), **to_data(holding), "total": holding.total, "fits": fits(holding, found)}
        for setting, holding in row.holdings.items()
    ]
    counts = {"blocks": row.blocks, "layers": row.layers, "evaluations": row.evaluations, "passes": row.passes}
    told = {"before": row.before} if row.before else {}
    return {**counts, **told, "updates": held}


def show_estimate(found: Estimate, *, everything: bool) -> None:
    request, case = found.request, found.request.case
    sizes = [f"length {case.length}"] * bool(case.length) + [f"size {case.size}"] * bool(case.size)
    options = ["in backward"] * request.in_backward + ["modulation recomputed"] * request.recompute_modulation
    what = ", ".join([f"batch {case.batch}", *sizes, case.precision, request.optimizer, *options])
    limit = "" if request.memory is None else f"; memory {size(request.memory)}"
    out.print(f"[bold]{escape(found.network)}[/]: {found.depth} layers, one update at {what}{limit}")
    shown = [row for row in found.rows if everything or is_shown(row, found)]
    for table in (parts_table(shown), sums_table(shown, found), cost_table(shown)):
        out.print(table)
    if len(shown) < len(found.rows):
        out.print(f"{len(found.rows) - len(shown)} more numbers of blocks with --all")
    for text in verdict(found):
        out.print(escape(text))
    for note in found.notes:
        out.print(f"[dim]{escape(note)}[/]")


def is_shown(row: Row, found: Estimate) -> bool:
    """Of a deep stack what divides its depth, usual numbers, and what is the answer."""
    picked = [*ALWAYS, *found.smallest.values(), None if found.best is None else found.best[0]]
    return found.depth <= SHORT or row.blocks is None or found.depth % row.blocks == 0 or row.blocks in picked


def parts_table(rows: list[Row]) -> Table:
    """What one update has in use, and what checkpointing makes of its activations."""
    table = grid("blocks", "parameters", "gradients", "optimiser", "activations", "checkpointed", title="in use")
    for row in rows:
        settings = by_kind(row)
        plain = settings.get(("away", False)) or settings["resident", False]
        kept = settings.get(("away", True)) or settings["resident", True]
        parts = (plain.parameters, plain.gradients, plain.optimizer, plain.activations, kept.activations)
        table.add_row(name(row), *map(size, parts))
    return table


def sums_table(rows: list[Row], found: Estimate) -> Table:
    table = grid(
        "blocks", "inactive\naway", "away and\ncheckpointed", "inactive\nresident", "resident and\ncheckpointed",
        title="held on the device",
    )  # fmt: skip
    for row in rows:
        settings = by_kind(row)
        sums = [total(settings.get((where, on)), found) for where in ("away", "resident") for on in (False, True)]
        table.add_row(name(row), *sums)
    return table


def by_kind(row: Row) -> dict[tuple[str, bool], Holding]:
    return {(setting.inactive, setting.checkpointing): held for setting, held in row.holdings.items()}


def name(row: Row) -> str:
    return "end-to-end" if row.blocks is None else str(row.blocks)


def total(held: Holding | None, found: Estimate) -> str:
    if held is None:
        return "-"
    colour = None if found.request.memory is None else ("green" if fits(held, found) else "red")
    return size(held.total) if colour is None else f"[{colour}]{size(held.total)}[/]"


def fits(held: Holding, found: Estimate) -> bool | None:
    memory = found.request.memory
    return None if memory is None else held.total <= memory


def cost_table(rows: list[Row]) -> Table:
    whole = rows[0].layers
    table = grid(
        "blocks", "layers an\nupdate", "updates for the\nlayers of one\nend-to-end", "evaluations\na prediction",
        "layers a\nprediction", "against\nend-to-end", title="cost",
    )  # fmt: skip
    told = any(row.before for row in rows)
    if told:
        table.add_column("layers before it,\nforward only", overflow="fold")
    for row in rows:
        ratio = f"{row.evaluations / whole:.2f} x"
        updates = "1" if row.blocks is None else str(row.blocks)
        before = [f"{row.before:.3g}"] * told
        table.add_row(name(row), str(row.layers), updates, str(row.passes), str(row.evaluations), ratio, *before)
    return table


def verdict(found: Estimate) -> Iterator[str]:
    memory = found.request.memory
    if memory is None:
        yield "no --memory was given, so nothing is chosen"
        return
    whole = {on: held for setting, held in found.rows[0].holdings.items() for on in [setting.checkpointing]}
    for on in (False, True):
        if whole[on].total <= memory:
            yield f"end-to-end training fits{' with activation checkpointing' if on else ''}: {size(whole[on].total)}"
            break
    if found.best is None:
        yield f"nothing fits into {size(memory)}"
        yield from map(advised, found.advice)
        return
    for setting, blocks in found.smallest.items():
        yield f"fewest blocks, {setting.words}: {'none fits' if blocks is None else blocks}"
    blocks, setting = found.best
    yield f"so the fewest blocks that fit are {blocks}, {setting.words}; the paper's evidence for so many:"
    yield from (f"  {line}" for line in found.evidence)


def advised(advice: Advice) -> str:
    so = "fits" if advice.fits else "does not fit"
    return f"{advice.change}: {size(advice.total)}, which {so} ({advice.blocks} blocks, {advice.setting.words})"
