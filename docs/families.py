"""The table of Transformers' classes in docs/families.md, from what the sweep wrote into docs/families.json.

python -m tests.acceptance.sweep --json docs/families.json    # two minutes on two cores
python docs/regenerate.py
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("families.json")
TITLES = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "image": "Image classification",
}
CONVERTS = ("accepted", "restricted", "looped", "part")
OTHER = ("refused", "crash", "not built")


def family_parts() -> dict[str, str]:
    """Marked parts of docs/families.md by name; none before the first sweep."""
    if not RESULTS.exists():
        return {}
    found = json.loads(RESULTS.read_text())
    tables = {f"families-{kind}": table(kind, rows) for kind, rows in found["rows"].items()}
    return {"families-counts": counts(found), **tables}


def counts(found: dict[str, Any]) -> str:
    lines = [
        f"| | classes | can be built | convert | {' | '.join((*CONVERTS, *OTHER))} |",
        "| --- |" + " --- |" * (3 + len(CONVERTS) + len(OTHER)),
    ]
    for kind, rows in found["rows"].items():
        number = Counter(row["verdict"] for row in rows.values())
        built = len(rows) - number["not built"]
        converted = sum(number[verdict] for verdict in CONVERTS)
        each = " | ".join(str(number[verdict]) for verdict in (*CONVERTS, *OTHER))
        lines.append(f"| {TITLES[kind]} | {len(rows)} | {built} | **{converted}** | {each} |")
    libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines += ["", f"Written by `python -m tests.acceptance.sweep --json docs/families.json` with {libraries}."]
    return "\n".join(lines)


def table(kind: str, rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"## {TITLES[kind]}", "", "| model type | class | outcome | |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {row['class']} | {row['verdict']} | {told(row)} |" for name, row in rows.items()]
    return "\n".join(lines)


def told(row: dict[str, Any]) -> str:
    """The stack of a class that converts; why the others do not."""
    layers = f"`{row['stack']}`: {row['layers']} layers, width {row['width']}" if "stack" in row else ""
    reason = row.get("reason", "")
    at = f" (`{row['node']}`)" if row["verdict"] == "refused" and "node" in row else ""
    why = f"{reason}{at}" if reason else ""
    return escaped("; ".join(filter(None, (layers, f"as a whole: {why}" if layers and why else why))))


def escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
