"""The tables of classification in docs/images.md, from `dbconvert compare` and the scripts that measure CIFAR-100."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDERS = ("digits", "digits-entry", "digits-noprop")
DIGITS, ENTRY, NOPROP = (Path(__file__).parent / name / "table.md" for name in FOLDERS)
"""As `dbconvert compare` wrote them; docs/images.md has the commands."""
CIFAR, CUDA = (Path(__file__).with_name(name) for name in ("cifar.json", "cifar_cuda.json"))
MISSING = "Not measured yet: `python docs/{script}`."
PAPER = {"end-to-end": 60.25, "3 blocks": 59.30}
"""Accuracy in %, of arXiv 2506.14202, after 500 epochs."""


def classification_parts() -> dict[str, str]:
    return {
        "digits-vit": DIGITS.read_text().rstrip(),
        "digits-entry": ENTRY.read_text().rstrip(),
        "digits-noprop": NOPROP.read_text().rstrip(),
        "cifar": part(CIFAR, cifar, "measure_cifar.py MOSAICS"),
        "cifar-cuda": part(CUDA, cuda, "measure_cifar_cuda.py MOSAICS"),
    }


def part(path: Path, table: Any, script: str) -> str:
    return table(json.loads(path.read_text())) if path.exists() else MISSING.format(script=script)


def libraries(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found["versions"].items())


def percent(values: list[float | None]) -> str:
    known = [f"{100 * value:.1f}" for value in values if value is not None]
    return f"{' / '.join(known)} %" if known else "-"


def cifar(found: dict[str, Any]) -> str:
    lines = ["| block | loss of its first updates | of its last |", "| --- | --- | --- |"]
    lines += [f"| {block} | {first:.3f} | {last:.3f} |" for block, (first, last) in found["losses"].items()]
    told = (
        f"{found['steps']} updates a block at batch {found['batch']}, killed and resumed from update "
        f"{found['resumed_at']}; then {100 * found['metrics']['accuracy_zero']:.1f} % of 2,000 test pictures right "
        f"from z = 0. Measured with `python docs/measure_cifar.py` on {found['machine']}; {libraries(found)}."
    )
    return "\n".join([*lines, "", told])


def cuda(found: dict[str, Any]) -> str:
    lines = [
        "| network | updates | accuracy (from z = 0) | over 8 draws | paper, 500 epochs | images a second, trained | "
        "captured | eager | floor |",
        "| --- " * 9 + "|",
    ]
    for name, row in found["rows"].items():
        metrics = row.get("metrics", {})
        right = percent([metrics.get("accuracy_zero", metrics.get("accuracy"))])
        paper = f"{PAPER[name]:.2f} %" if name in PAPER else "-"
        speeds = [found["speed"].get(name, {}).get(key, {}) for key in ("captured", "eager", "captured, floor")]
        rates = [f"{one['images_per_second']:,}" if "images_per_second" in one else "-" for one in (row, *speeds)]
        over = percent([metrics.get("accuracy_average")])
        lines.append(f"| {name} | {row.get('updates', 0):,} | {right} | {over} | {paper} | {' | '.join(rates)} |")
    told = f"{found.get('epochs', 0)} epochs of end-to-end training, and as many layer evaluations in the other rows, "
    told += f"on {found['device']}; {libraries(found)}. The floor is a step on a batch that is there already, without "
    told += "augmentation. Measured with `python docs/measure_cifar_cuda.py`."
    return "\n".join([*lines, "", told])
