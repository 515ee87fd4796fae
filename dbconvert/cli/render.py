"""Drawing: progress, tables and errors on the terminal, and the JSON forms of results."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from dbconvert.amounts import size
from dbconvert.errors import DBConvertError, Refused
from dbconvert.events import Advance, Event, Note, Reporter, Stage

if TYPE_CHECKING:
    from dbconvert.anatomy import Anatomy, GateSite, Layer, NormSite
    from dbconvert.engine.comparison import Comparison
    from dbconvert.engine.demo import Row
    from dbconvert.engine.evaluate import Evaluation
    from dbconvert.engine.grid import Planned
    from dbconvert.engine.memory import UnitMemory
    from dbconvert.engine.outline import Outline
    from dbconvert.engine.split import SplitResult
    from dbconvert.engine.train import TrainResult
    from dbconvert.plan import NoiseFit, Plan

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
ITSELF = "(the network itself)"


def say(text: str) -> None:
    out.print(escape(text))


def emit(data: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def grid(*headers: str, **options: Any) -> Table:
    """A table that folds what is too wide; nothing is cut off."""
    return Table(*(Column(header, overflow="fold") for header in headers), **options)


def show_error(error: DBConvertError) -> None:
    err.print(f"[bold red]error:[/] {escape(error.message)}")
    for label, text in (("where", error.where), ("why", error.why), ("try", error.hint)):
        if text:
            err.print(f"  [bold]{label}:[/] {escape(text)}")


@contextmanager
def progress() -> Iterator[Reporter]:
    """Progress bars on stderr, one a stage; notes appear above them."""
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=err,
        transient=not err.is_terminal,
        disable=not err.is_terminal,
    )
    current: list[Any] = []

    def report(event: Event) -> None:
        if isinstance(event, Note):
            style = "yellow" if event.warning else "bold"
            prefix = "warning: " if event.warning else ""
            bars.console.print(f"[{style}]{prefix}{escape(event.text)}[/]")
        elif isinstance(event, Stage):
            finish()
            current[:] = [bars.add_task(event.name, total=event.total, figures="")]
        elif isinstance(event, Advance) and current:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in event.values.items())
            bars.update(current[0], advance=event.steps)
            if figures:
                bars.update(current[0], figures=figures)

    def finish() -> None:
        for task in current:
            total = bars.tasks[-1].total
            bars.update(task, total=total or 1, completed=total or 1)

    with bars:
        yield report
        finish()


# -- inspect ----------------------------------------------------------------------------------------------------


def anatomy_json(anatomy: Anatomy) -> dict[str, Any]:
    from dbconvert.schema import to_data

    return {
        "verdict": anatomy.verdict,
        "stack": anatomy.stack,
        "layers": anatomy.depth,
        "width": anatomy.width,
        "streams": anatomy.streams,
        "reason": None,
        "calls": anatomy.calls,
        "anatomy": to_data(anatomy),
    }


@contextmanager
def refusals(*, as_json: bool) -> Iterator[None]:
    """Prints a refusal as JSON too, where that was asked for."""
    try:
        yield
    except Refused as refusal:
        if as_json:
            emit(refusal_json(refusal))
        raise


def refusal_json(refusal: Refused) -> dict[str, Any]:
    facts = refusal.facts
    return {
        "verdict": "refused",
        "stack": facts.get("stack"),
        "layers": facts.get("layers"),
        "width": facts.get("width"),
        "streams": facts.get("streams"),
        "reason": refusal.reason,
        "calls": facts.get("calls"),
        "kind": refusal.kind,
        "node": refusal.node,
        "hint": refusal.hint or None,
    }


def show_anatomy(anatomy: Anatomy) -> None:
    colour = {"accepted": "green", "restricted": "yellow", "looped": "yellow"}[anatomy.verdict]
    called = "once" if anatomy.calls == 1 else f"{anatomy.calls} times"
    out.print(f"[bold {colour}]{anatomy.verdict}[/]  {escape(anatomy.network)}")
    out.print(
        f"stack [bold]{escape(anatomy.stack or ITSELF)}[/]: {anatomy.depth} layers, each called {called}, "
        f"width {anatomy.width}, {anatomy.streams} stream{'s' if anatomy.streams > 1 else ''} "
        f"{list(anatomy.stream_shape)}{second_words(anatomy)}"
    )
    for note in anatomy.notes:
        out.print(f"[yellow]{escape(note)}[/]")
    proof = grid("proof", "shown", box=None, pad_edge=False)
    for check in anatomy.proof:
        proof.add_row(("[green]yes[/] " if check.passed else "[red]no[/] ") + escape(check.name), escape(check.detail))
    out.print(proof)
    if anatomy.layers[0].branches:
        out.print(branch_table(anatomy.layers[0], "branches of the first layer" if same(anatomy) else "branches"))
    out.print(part_table(anatomy))
    if anatomy.layers[0].side_inputs:
        listed = (f"{'.'.join(map(str, s.argument))} {list(s.shape)}" for s in anatomy.layers[-1].side_inputs)
        out.print(f"side inputs of the layers: {escape(', '.join(listed))}")


def second_words(anatomy: Anatomy) -> str:
    second = anatomy.layers[0].second_in
    return f" and {escape('.'.join(map(str, second)))}" if second else ""


def same(anatomy: Anatomy) -> bool:
    return len({tuple(b.placement for b in layer.branches) for layer in anatomy.layers}) == 1


def branch_table(layer: Layer, title: str) -> Table:
    table = grid("added at node", "placement", "norm", "gate after", title=f"{title} ({escape(layer.path)})")
    for branch in layer.branches:
        table.add_row(
            branch.addition,
            branch.placement,
            escape(f"{place(branch.norm)} ({branch.norm.node})"),
            escape(f"{place(branch.gate)} ({branch.gate.node})"),
        )
    return table


def place(site: NormSite | GateSite) -> str:
    """Where a site is: a module, or functions called in it."""
    calls = [site.call] if site.call is not None else [use.call for use in getattr(site, "uses", ())]
    functions = ", ".join(dict.fromkeys(f"{call.name}()" for call in calls))
    module = site.module or "the layer"
    return f"{functions} in {module}" if functions else module


def part_table(anatomy: Anatomy) -> Table:
    table = grid("part", "modules", "parameters", "bytes")
    table.add_row("stem", listed(anatomy.stem.modules), f"{anatomy.stem.parameters:,}", size(anatomy.stem.bytes))
    parameters = sum(layer.parameters for layer in anatomy.layers)
    stored = sum(layer.bytes for layer in anatomy.layers)
    kinds = Counter(layer.type for layer in anatomy.layers)
    named = escape(", ".join(f"{count} x {name}" for name, count in kinds.items()))
    table.add_row("layers", named, f"{parameters:,}", size(stored))
    table.add_row(
        "readout",
        listed(anatomy.readout.modules),
        f"{anatomy.readout.parameters:,}",
        size(anatomy.readout.bytes),
    )
    return table


def listed(names: tuple[str, ...], most: int = 5) -> str:
    shown = ", ".join(name or ITSELF for name in names[:most])
    return escape(shown + (f" and {len(names) - most} more" if len(names) > most else ""))


# -- split and train ----------------------------------------------------------------------------------------------


def split_json(result: SplitResult) -> dict[str, Any]:
    from dbconvert.schema import to_data

    plan, noise = result.plan, result.noise
    return {
        "blocks": [list(block) for block in plan.blocks],
        "noise": {**to_data(noise), "boundaries": list(noise.boundaries), "sigma_data": noise.sigma_data},
        "package": str(result.package) if result.package is not None else None,
        "task": plan.task,
        "target": to_data(plan.target),
        "start": plan.start,
        "condition_width": plan.condition_width,
        "stack": plan.anatomy.stack,
        "verdict": plan.anatomy.verdict,
        "context": plan.context,
        "warnings": list(result.warnings),
    }


def noise_table(plan: Plan, noise: NoiseFit) -> Table:
    intervals = noise.intervals()
    kind = "entropy" if noise.rule == "auto" else "mass"
    table = grid("block", "layers", noise.level, "trained on", kind)
    for block, (first, last) in enumerate(plan.blocks):
        low, high = intervals.owned(block)
        least, most = intervals.training(block)
        table.add_row(
            str(block),
            f"{first}-{last}",
            f"{low:.4g} to {high:.4g}",
            f"{least:.4g} to {most:.4g}",
            f"{100 * intervals.share(block):.1f} %",
        )
    return table


def show_split(result: SplitResult) -> None:
    from dbconvert.engine.package_texts import placement_words

    plan, noise = result.plan, result.noise
    stack = escape(plan.anatomy.stack or ITSELF)
    out.print(
        f"[bold]{escape(plan.anatomy.network)}[/]: {plan.anatomy.depth} layers ({stack}) in {len(plan.blocks)} blocks, "
        f"task {plan.task}, start {plan.start}, conditioning {plan.condition_width} wide"
        + (f", context {plan.context}" if plan.context != "raw" else "")
    )
    for line in filter(None, placement_words(plan)):
        out.print(escape(line))
    out.print(noise_table(plan, noise))
    scale = "" if noise.rule == "mask" else f"; sigma_data {noise.sigma_data:.4g}"
    out.print(f"noise {noise.rule}: {escape(noise.basis)}{scale}")
    if result.package is None:
        out.print("dry run: nothing was written")
    else:
        folder = escape(str(result.package))
        then = f"train it with: dbconvert train {folder}" if plan.task else "no task can train it yet"
        out.print(f"wrote [bold]{folder}/[/]; {then}")


def show_outline(outline: Outline) -> None:
    out.print(f"method {outline.method}, {outline.length}")
    out.print(noise_table(outline.plan, outline.noise))
    table = grid("update of", "trainable parameters", "state", "activations", "both")
    for unit in outline.memory.units:
        table.add_row(unit.name, *unit_cells(unit))
    for method, memory in outline.controls.items():
        table.add_row("shallow control" if method == "shallow" else method, *unit_cells(memory.largest))
    out.print(table)
    memory = outline.memory
    peak = memory.resident_state + memory.largest.activations
    out.print(
        f"resident: {memory.resident_parameters:,} parameters, {size(memory.resident_state)} with gradients and "
        f"optimiser state; expected peak {size(peak)} beside the libraries"
    )


def unit_cells(unit: UnitMemory) -> tuple[str, ...]:
    return f"{unit.trainable:,}", size(unit.state), size(unit.activations), size(unit.state + unit.activations)


def show_run(result: TrainResult) -> None:
    out.print(f"finished [bold]{escape(str(result.folder))}[/]")
    if result.metrics:
        out.print(metric_table(result.metrics, "validation"))


# -- eval and demo ------------------------------------------------------------------------------------------------


def metric_table(metrics: dict[str, float], title: str) -> Table:
    table = grid("figure", "value", title=title)
    for name, value in metrics.items():
        accuracy = name.startswith("accuracy")
        table.add_row(name, f"{100 * value:.2f} %" if accuracy else f"{value:.4f}")
    return table


def evaluation_json(result: Evaluation) -> dict[str, Any]:
    from dbconvert.schema import to_data

    data: dict[str, Any] = to_data(result)
    return data


def show_evaluation(result: Evaluation) -> None:
    out.print(metric_table(result.metrics, f"{result.source}, {result.part}: {result.examples} examples"))


def demo_json(folder: Path, rows: list[Row]) -> dict[str, Any]:
    from dbconvert.schema import to_data

    return {"folder": str(folder), "rows": to_data(rows)}


def show_demo(folder: Path, rows: list[Row]) -> None:
    headers = ("network", "layers", "updates", "test\naccuracy", "activations", "state\nin use", "state\nheld")
    table = grid(
        *headers,
        title="scikit-learn digits, 300 test images",
        caption="layers, activations and state in use: of one update; state held: by the whole run",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )  # fits a terminal of 80 columns
    for row in rows:
        table.add_row(
            row.name,
            str(row.layers),
            str(row.updates),
            f"{100 * row.accuracy:.1f} %",
            size(row.activations),
            size(row.state),
            size(row.held),
        )
    out.print(table)
    out.print(f"everything is in [bold]{escape(str(folder))}/[/]")


# -- compare ------------------------------------------------------------------------------------------------------


def show_cells(cells: list[tuple[Planned, str]], folder: Path) -> None:
    table = grid("training", "seed", "cell")
    for planned, status in cells:
        table.add_row(escape(planned.cell.name), str(planned.cell.seed), status)
    out.print(table)
    out.print(f"{len(cells)} cells in [bold]{escape(str(folder))}/[/]; dry run: nothing was run")


def show_comparison(found: Comparison) -> None:
    headers, lines = found.table()
    for about, titles in found.groups().items():
        chosen = [0, *(headers.index(title) for title in titles)]
        table = grid(*(headers[i] for i in chosen), title=about, title_justify="left", box=SIMPLE_HEAD)
        for line in lines:
            table.add_row(*(escape(line[i]) for i in chosen))
        out.print(table)
    for note in found.notes():
        out.print(escape(note))
