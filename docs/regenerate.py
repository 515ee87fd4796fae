"""Measures what README.md and docs/ claim, and writes the numbers, outputs and the file map into them.

    python docs/regenerate.py            # measure what results.json lacks, then rewrite the marked parts
    python docs/regenerate.py --fresh    # measure everything again (about 15 minutes on two cores)
    python docs/regenerate.py --check    # only say whether the files are up to date with results.json

Parts are marked <!-- begin: NAME --> ... <!-- end: NAME --> in the files.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from classification_tables import classification_parts
from context_tables import context_parts
from depth_tables import depth_parts
from dit_tables import dit_parts
from families import family_parts
from masked_tables import masked_parts
from memory_tables import memory_parts
from recurrent_tables import recurrent_parts
from refusals import refusal_parts
from step_tables import step_parts
from text_tables import text_parts

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results.json"
SIZE = ROOT / "docs" / "size.json"
FITS = ROOT / "docs" / "fits.json"
COPYING = ROOT / "docs" / "copying.json"
PAGES = (
    "README.md",
    "docs/training.md",
    "docs/size.md",
    "docs/families.md",
    "docs/will-it-convert.md",
    "docs/text.md",
    "docs/images.md",
    "docs/context.md",
    "docs/memory.md",
)
SEEDS = (0, 1, 2)
VARIANTS = {
    "shared": ["train.periphery=shared"],
    "frozen-target": ["train.periphery=frozen-target"],
    "edm": ["noise.rule=edm"],
    "edm, sigma_data of the table": ["noise.rule=edm", "noise.sigma_data=0.12"],
}
TOUR = {
    "inspect": ["inspect", "examples/vit.py"],
    "estimate": ["estimate", "examples/vit.py", "--memory", "20MB", "--batch", "128"],
    "split": ["split", "examples/vit.py", "--blocks", "3", "--data", "digits", "--dry-run"],
    "dry-run": ["train", "vit_digits", "--dry-run"],
}


# -- measuring --------------------------------------------------------------------------------------------------


def run(*arguments: str, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "COLUMNS": "110", "TERM": "dumb"}
    done = subprocess.run(
        ["dbconvert", *arguments], capture_output=True, text=True, cwd=cwd, env=environment, check=True
    )
    return done.stdout


def measure(results: dict[str, Any]) -> None:
    results.setdefault("versions", {name: version(name) for name in ("dbconvert", "torch", "transformers")})
    results.setdefault("machine", f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    for name, command in TOUR.items():
        if name not in results.setdefault("tour", {}):
            results["tour"][name] = trimmed(run(*command))
            save(results)
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(str, SEEDS):
            if seed not in results.setdefault("demo", {}):
                say(f"demo, seed {seed}")
                rows = json.loads(run("demo", "--seed", seed, "--json", cwd=Path(folder)))["rows"]
                results["demo"][seed] = [{k: v for k, v in row.items() if k != "metrics"} for row in rows]
                save(results)
        for name, overrides in VARIANTS.items():
            for seed in map(str, SEEDS):
                if seed not in results.setdefault("variants", {}).setdefault(name, {}):
                    say(f"{name}, seed {seed}")
                    out = f"{re.sub('[^a-z]', '', name)}-{seed}"
                    run("train", "vit_digits", f"seed={seed}", *overrides, "-o", out, cwd=Path(folder))
                    found = json.loads(run("eval", out, "--json", cwd=Path(folder)))["metrics"]
                    kept = ("accuracy_zero", "accuracy_draw", "accuracy_average")
                    results["variants"][name][seed] = {key: round(found[key], 4) for key in kept}
                    save(results)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def save(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


# -- writing ----------------------------------------------------------------------------------------------------


def parts(results: dict[str, Any]) -> dict[str, str]:
    """Every marked part by name."""
    tour = {
        f"tour-{name}": f"```\n$ dbconvert {' '.join(TOUR[name])}\n{text}\n```"
        for name, text in results["tour"].items()
    }
    return {
        **tour,
        "demo": demo_table(results),
        "variants": variant_table(results),
        "map": file_map(),
        "machine": machine(results),
        "copying": copying_table(),
        **size_parts(json.loads(SIZE.read_text())),
        **fits_parts(json.loads(FITS.read_text())),
        **family_parts(),
        **refusal_parts(),
        **classification_parts(),
        **text_parts(),
        **masked_parts(),
        **context_parts(),
        **recurrent_parts(),
        **dit_parts(),
        **memory_parts(),
        **step_parts(),
        **depth_parts(),
    }


def machine(results: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"Measured with `python docs/regenerate.py` on {results['machine']}; {libraries}."


def demo_table(results: dict[str, Any]) -> str:
    lines = [
        "| network | layers | updates | test accuracy, seeds 0 / 1 / 2 | median | activations | state in use | held |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rows in zip(*results["demo"].values(), strict=True):
        accuracies = [100 * row["accuracy"] for row in rows]
        row = rows[0]
        figures = " / ".join(f"{value:.1f}" for value in accuracies)
        sizes = " | ".join(f"{row[key] / 1e6:.1f} MB" for key in ("activations", "state", "held"))
        lines.append(
            f"| {row['name']} | {row['layers']} | {row['updates']} | {figures} % "
            f"| {statistics.median(accuracies):.1f} % | {sizes} |"
        )
    return "\n".join(lines)


def variant_table(results: dict[str, Any]) -> str:
    lines = [
        "| form | from z = 0, seeds 0 / 1 / 2 | single noise draw | average of 8 draws |",
        "| --- | --- | --- | --- |",
    ]
    for name, seeds in results["variants"].items():
        cells = [
            " / ".join(f"{100 * found[key]:.1f}" for found in seeds.values()) + " %"
            for key in next(iter(seeds.values()))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def copying_table() -> str:
    """What docs/measure_copying.py --save measured."""
    found = json.loads(COPYING.read_text())
    lines = [
        "| command | writing the weights | `cp -r` of them | resident memory above imports |",
        "| --- | --- | --- | --- |",
    ]
    for name in ("split", "assemble --original", "assemble"):
        row = found[name]
        lines.append(f"| {name} | {row['writing']:.1f} s | {row['cp']:.1f} s | {row['above imports']:.0f} MB |")
    head = f"A random Llama of {found['bytes'] / 1e9:.1f} GB in bf16 shards (`docs/measure_copying.py`, medians of"
    return f"{head} {found['repeats']}, in turns with the copies):\n\n" + "\n".join(lines)


def size_parts(size: dict[str, Any]) -> dict[str, str]:
    """The tables that docs/measure_size.py measured."""
    libraries = ", ".join(f"{name} {number}" for name, number in size["versions"].items())
    return {
        "size-70b": large_table(size["70b"]),
        "size-activations": activation_table(size["activations"]),
        "size-machine": f"Measured with `python docs/measure_size.py` on {size['machine']}; {libraries}.",
    }


def fits_parts(fits: dict[str, Any]) -> dict[str, str]:
    """The table that docs/measure_fits.py measured."""
    lines = ["| training | limit | estimated | most anonymous memory | of the estimate | outcome |", "| --- " * 6 + "|"]
    for name, row in fits["rows"].items():
        told = (row[key] for key in ("limit", "estimate", "peak"))
        limit, estimate, peak = (f"{size / 1e6:.0f} MB" if size else "-" for size in told)
        outcome = row["outcome"].split("\n", 1)[0]
        ratio = f"{row['ratio']:.2f}" if outcome == "trained" else "-"
        lines.append(f"| {name} | {limit} | {estimate} | {peak} | {ratio} | {outcome} |")
    libraries = ", ".join(f"{name} {number}" for name, number in fits["versions"].items())
    lines += ["", f"Measured with `python docs/measure_fits.py` on {fits['machine']}; {libraries}."]
    return {"fits": "\n".join(lines)}


def large_table(found: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| command | wall s | CPU s | peak resident | load |", "| --- | --- | --- | --- | --- |"]
    for name, runs in found.items():
        wall, cpu, load = (" / ".join(f"{run[key]:.1f}" for run in runs) for key in ("wall", "cpu", "load"))
        lines.append(f"| {name} | {wall} | {cpu} | {max(run['peak_mb'] for run in runs):.0f} MB | {load} |")
    return "\n".join(lines)


def activation_table(found: dict[str, dict[str, dict[str, dict[str, int]]]]) -> str:
    lines = ["| network | precision | update of | autograd keeps | estimated | off by |", "| --- " * 6 + "|"]
    for network, precisions in found.items():
        for precision, runs in precisions.items():
            for label, both in runs.items():
                real, told = both["measured"], both["estimated"]
                off = 100 * (told / real - 1)
                lines.append(
                    f"| {network} | {precision} | {label} | {real / 1e6:.2f} MB | {told / 1e6:.2f} MB | {off:+.2f} % |"
                )
    return "\n".join(lines)


def file_map() -> str:
    """One line a file: the first line of its docstring."""
    lines = []
    for folder in sorted({path.parent for path in (ROOT / "dbconvert").rglob("*.py")}):
        name = folder.relative_to(ROOT)
        lines.append(f"{name}/".ljust(36) + first_line(folder / "__init__.py"))
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"  {path.name} ".ljust(36) + first_line(path))
    return "```\n" + "\n".join(lines) + "\n```"


def first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.split("\n", 1)[0]


def rewritten(text: str, found: dict[str, str]) -> str:
    for name, part in found.items():
        pattern = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, part=part: match[1] + part + "\n" + match[2], text)  # type: ignore[misc]
    return text


def outdated(results: dict[str, Any]) -> list[str]:
    found = parts(results)
    return [page for page in PAGES if rewritten((ROOT / page).read_text(), found) != (ROOT / page).read_text()]


def main() -> int:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and "--fresh" not in sys.argv else {}
    if "--check" in sys.argv:
        stale = outdated(results)
        say("up to date" if not stale else f"run docs/regenerate.py: {', '.join(stale)}")
        return int(bool(stale))
    measure(results)
    found = parts(results)
    for page in PAGES:
        path = ROOT / page
        path.write_text(rewritten(path.read_text(), found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
