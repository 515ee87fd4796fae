"""What splitting and assembling a large checkpoint cost: python docs/measure_copying.py [GIGABYTES] [FOLDER] [--save].

A random Llama-like checkpoint in bf16 shards is made in FOLDER (the temporary folder by default), copied, split,
turned back, and assembled as if its blocks had been trained; everything is removed afterwards. Four times as much
disk is needed. Each measured command runs in a process of its own, in turns with `cp -r` of the checkpoint. Prints one
JSON object: medians of seconds, and megabytes of resident memory (`ru_maxrss`, what /usr/bin/time -v calls maximum
resident set size) beside what a process has that only imports the same modules. `--save` keeps it for the README.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("copying.json")
REPEATS = 3
WIDTH, INNER, VOCABULARY, HEADS = 2048, 5632, 32000, 16
BYTES_OF_A_LAYER = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
SHARD = 10**9

IMPORTS = """
import importlib
for name in {names!r}:
    try:
        importlib.import_module(name)
    except Exception:
        pass
"""
SPLIT = """
import dbconvert
from dbconvert.recipe import SplitOptions
dbconvert.split({source!r}, out={out!r}, options=SplitOptions(blocks=4), report=report)
"""
ASSEMBLE = """
import dbconvert
dbconvert.assemble([{source!r}], out={out!r}, original={original}, report=report)
"""
HERE = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import measure_copying
measure_copying.{call}
"""
CHILD = """
import json, resource, sys, time
marks = [("begin", time.perf_counter())]
def report(event):
    marks.append((getattr(event, "name", getattr(event, "text", "")), time.perf_counter()))
{body}
marks.append(("end", time.perf_counter()))
spans = {{name: after - at for (name, at), (_, after) in zip(marks, marks[1:])}}
print(json.dumps({{"spans": spans, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "modules": [name for name in sys.modules if not name.startswith("__")]}}))
"""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def child(body: str) -> dict[str, Any]:
    """Seconds by stage and the highest resident memory in MB of a Python process."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(body=body)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def here(call: str) -> None:
    """Runs a function of this file in a process of its own: a process that starts others hands its size on to them."""
    child(HERE.format(folder=str(Path(__file__).parent), call=call))


def make_checkpoint(folder: Path, size: int) -> None:
    """Shards of random numbers under Llama's keys."""
    import torch
    from transformers import LlamaConfig

    from dbconvert.checkpoint import save_checkpoint

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        vocab_size=VOCABULARY,
        num_attention_heads=HEADS,
        num_hidden_layers=max(4, round((size - 4 * WIDTH * VOCABULARY) / BYTES_OF_A_LAYER)),
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    shapes["model.norm.weight"] = (WIDTH,)  # type: ignore[assignment]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes.update({f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"})
        shapes.update({f"{layer}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")})
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, INNER)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (WIDTH,)  # type: ignore[assignment]
    numbers = torch.randn(1 << 25).bfloat16()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        count = torch.Size(shape).numel()
        begin = int(torch.randint(0, len(numbers), (), generator=generator)) % max(1, len(numbers) - count)
        some = numbers[begin : begin + count]
        if count > len(numbers):
            some = numbers.repeat(-(-count // len(numbers)))[:count]
        tensors[key] = some.reshape(shape)
    save_checkpoint(folder / "model.safetensors", tensors, {}, SHARD)


def make_run(package: Path, folder: Path) -> None:
    """A run that says it trained the package's blocks: the files are what training writes."""
    from dbconvert.checkpoint import save_tensors
    from dbconvert.engine.noise import edm_noise
    from dbconvert.engine.package import NOISE, NOISE_KEY, PLAN, PLAN_KEY, RECIPE, WEIGHTS
    from dbconvert.engine.runs import RunInfo, start_run
    from dbconvert.files import sha256_file, write_text
    from dbconvert.plan import read_plan
    from dbconvert.schema import to_json
    from dbconvert.tensorfile import read_header

    plan = read_plan(package / PLAN)
    noise = edm_noise(plan.noise, len(plan.blocks))
    files = {}
    for file in sorted((package / WEIGHTS).iterdir()):
        target = folder / WEIGHTS / file.name
        save_tensors(target, read_header(file)[0], {PLAN_KEY: plan.identity, NOISE_KEY: noise.identity})
        files[file.name] = sha256_file(target)
    for name, text in ((PLAN, to_json(plan)), (NOISE, to_json(noise)), (RECIPE, (package / RECIPE).read_text())):
        write_text(folder / name, text)
    blocks = tuple(range(len(plan.blocks)))
    info = RunInfo(
        "complete",
        "blocks",
        str(package),
        str(package),
        plan.identity,
        noise.identity,
        blocks,
        None,
        "shared",
        1,
        files=files,
    )
    start_run(folder, info)


def timed_copy(source: Path, target: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    return time.perf_counter() - begin


def measured(work: Path, body: str, out: Path, stage: str, source: Path) -> dict[str, float]:
    """A command against plain copies of the same files, taken in turns."""
    copies, phases, resident, whole, names = [], [], [], [], []
    for turn in range(2 * REPEATS):
        if turn % 4 in (0, 3):  # each goes first half of the time
            copies.append(timed_copy(source, work / "copy"))
            shutil.rmtree(work / "copy")
            continue
        shutil.rmtree(out, ignore_errors=True)
        found = child(body)
        phases.append(found["spans"][stage])
        whole.append(sum(found["spans"].values()))
        resident.append(found["rss"])
        names = found["modules"]
    imports = child(IMPORTS.format(names=names))["rss"]
    copy, phase = statistics.median(copies), statistics.median(phases)
    return {
        "cp": round(copy, 2),
        "writing": round(phase, 2),
        "ratio": round(phase / copy, 2),
        "whole": round(statistics.median(whole), 2),
        "resident": round(max(resident), 1),
        "imports": round(imports, 1),
        "above imports": round(max(resident) - imports, 1),
    }


def main(gigabytes: float, parent: str | None) -> None:
    work = Path(tempfile.mkdtemp(dir=parent, prefix="measure-copying-"))
    source, package, run = work / "checkpoint", work / "package", work / "run"
    try:
        here(f"make_checkpoint(Path({str(source)!r}), {int(gigabytes * 10**9)})")
        size = sum(file.stat().st_size for file in source.iterdir())
        results: dict[str, Any] = {"bytes": size, "repeats": REPEATS}
        split = SPLIT.format(source=str(source), out=str(package))
        results["split"] = measured(work, split, package, "writing the weights", source)
        stage = "writing the checkpoint"
        back = ASSEMBLE.format(source=str(package), out=str(work / "out"), original=True)
        results["assemble --original"] = measured(work, back, work / "out", stage, source)
        shutil.rmtree(work / "out")
        here(f"make_run(Path({str(package)!r}), Path({str(run)!r}))")
        trained = ASSEMBLE.format(source=str(run), out=str(work / "out"), original=False)
        results["assemble"] = measured(work, trained, work / "out", stage, source)
        say(json.dumps(results, indent=1))
        if "--save" in sys.argv:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if argument != "--save"]
    main(float(given[0]) if given else 4.0, given[1] if len(given) > 1 else None)
