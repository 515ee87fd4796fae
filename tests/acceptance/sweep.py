"""Which of Transformers' classes convert: every causal-LM, masked-LM and image-classification class, built tiny.

    python -m tests.acceptance.sweep [causal|masked|image ...] [--only TYPE ...] [--json FILE] [--jobs N]

Each class is built, analysed and proved in a process of its own under a time limit, so that a crash or a hang is
one row. Counts are in the last lines.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from dbconvert.graph.analysis import gather
from tests.acceptance.classes import KINDS, NotBuilt, build, class_of
from tests.acceptance.judge import Row, judge

LIMIT = 120
"""Seconds that one class may take."""

VERDICTS = ("accepted", "restricted", "looped", "part", "refused", "crash", "not built")
Rows = dict[str, Row]


def sweep(kind: str, only: list[str] | None = None, jobs: int = 2) -> Iterator[tuple[str, Row, float]]:
    """(model type, row, seconds) of every class of a kind, in the mapping's order."""
    types = [t for t in KINDS[kind] if only is None or t in only]
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda model_type: in_process(kind, model_type), types)


def in_process(kind: str, model_type: str) -> tuple[str, Row, float]:
    """The row of one class, from a forked process: torch and transformers are imported once."""
    start = time.monotonic()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(kind, model_type, sender), daemon=True)
    process.start()
    sender.close()
    try:
        row = receiver.recv() if receiver.poll(LIMIT) else Row("crash", reason=f"took more than {LIMIT} s")
    except EOFError:
        process.join()
        row = Row("crash", reason=f"the process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()
    return model_type, row, time.monotonic() - start


def work(kind: str, model_type: str, sender: Connection) -> None:
    silence()
    try:
        model, inputs = build(kind, model_type)
    except NotBuilt as error:
        row = Row("not built", reason=str(error))
    else:
        row = judge(model, inputs)
    sender.send(row)
    sender.close()


def silence() -> None:
    """Libraries warn from C and from Python: nothing of it belongs in the table."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def warm_up() -> None:
    """Imports what every network needs before the processes fork: several seconds a class otherwise."""
    for kind, model_type in (("causal", "llama"), ("image", "vit")):
        model, inputs = build(kind, model_type)
        gather(model, inputs)


def line(model_type: str, name: str, row: Row, seconds: float) -> str:
    what = f"{row.stack}: {row.layers} layers, width {row.width}" if row.stack else ""
    why = f"{row.kind}: {row.reason}" if row.kind else row.reason
    at = f" [{row.node}]" if row.node and row.verdict == "refused" else ""
    return (
        f"{model_type:28s} {name:40s} {row.verdict:11s} {'; '.join(filter(None, (what, why)))}{at}  ({seconds:.1f} s)"
    )


def counts(rows: Rows) -> str:
    found = Counter(row.verdict for row in rows.values())
    return ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS)


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    warm_up()
    found: dict[str, Rows] = {}
    start = time.monotonic()
    for kind in options.kinds or list(KINDS):
        found[kind] = {}
        for model_type, row, seconds in sweep(kind, options.only, options.jobs):
            found[kind][model_type] = row
            say(line(model_type, class_of(kind, model_type), row, seconds))
    for kind, rows in found.items():
        say(f"{kind}: {len(rows)} classes: {counts(rows)}")
    say(f"{time.monotonic() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    return 0


def as_json(found: dict[str, Rows]) -> dict[str, object]:
    rows = {k: {t: {"class": class_of(k, t), **row.as_json()} for t, row in rs.items()} for k, rs in found.items()}
    return {"versions": {name: version(name) for name in ("torch", "transformers")}, "rows": rows}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="which classes; all when none is named")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
