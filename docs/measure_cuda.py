"""Peak device memory of one block update on CUDA beside what `estimate` says, written to docs/size_cuda.json.

    python docs/measure_cuda.py              # what size_cuda.json lacks: a run that was stopped goes on
    python docs/measure_cuda.py --fresh

Every case runs in a process of its own and is saved as it ends. The peak is `torch.cuda.max_memory_allocated`: it
holds what the allocator gave out, with neither the context of CUDA nor fragmentation. One update before the measured
one makes the optimiser's state. Needs a CUDA device.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "size_cuda.json"
BATCHES, PRECISIONS = (4, 16), ("fp32", "bf16")
LENGTH = 512


def main() -> int:
    if "--case" in sys.argv:
        sys.stdout.write(json.dumps(one_case(*sys.argv[sys.argv.index("--case") + 1 :])) + "\n")
        return 0
    if not torch.cuda.is_available():
        sys.stderr.write("no CUDA device: nothing was measured\n")
        return 1
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and "--fresh" not in sys.argv else {}
    results["device"] = torch.cuda.get_device_name()
    results["versions"] = {name: version(name) for name in ("dbconvert", "torch", "transformers")}
    failed = 0
    for source in sources():
        for batch in BATCHES:
            for precision in PRECISIONS:
                for blocks in (1, 2, 4):
                    key = f"{source}, batch {batch}, {precision}, {blocks} blocks"
                    if key in results.setdefault("cases", {}):
                        continue
                    command = [sys.executable, __file__, "--case", source, str(batch), precision, str(blocks)]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode:
                        failed += 1
                        sys.stderr.write(f"{key} failed:\n{done.stderr[-2000:]}\n")
                        continue
                    results["cases"][key] = json.loads(done.stdout.splitlines()[-1])
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    errors = [case["peak"] / case["estimated"] - 1 for case in results["cases"].values()]
    sys.stdout.write(f"{len(errors)} cases, estimate off by at most {100 * max(map(abs, errors), default=0):.1f} %\n")
    return int(bool(failed) or any(abs(error) > 0.15 for error in errors))


def sources() -> list[str]:
    sys.path.insert(0, str(ROOT / "docs"))
    import measure_size

    return [measure_size.BY_HAND, *measure_size.FAMILIES]


def one_case(name: str, batch: str, precision: Any, blocks: str) -> dict[str, int]:
    """The first of `blocks` blocks: bytes estimated, and the peak of an update on the device."""
    sys.path.insert(0, str(ROOT / "docs"))
    import measure_size
    import transformers

    from dbconvert.engine.estimate import as_one_block
    from dbconvert.engine.holdings import holding, inventory
    from dbconvert.engine.opening import open_and_analyse
    from dbconvert.engine.rehearsal import Case, Rehearsal
    from dbconvert.events import silent
    from dbconvert.graph.cut import strip

    with tempfile.TemporaryDirectory() as folder:
        if name == measure_size.BY_HAND:
            source, length = str(ROOT / "examples" / "vit.py") + ":vit_cifar100", None
        else:
            kind, architecture, options = measure_size.FAMILIES[name]
            getattr(transformers, kind)(**options, architectures=[architecture]).save_pretrained(folder)
            source, length = folder, LENGTH if "vocab_size" in options else None
        opened = open_and_analyse(source, stack=None, weights=None, seed=0, report=silent)
    network = as_one_block(opened)
    layers = range(opened.anatomy.depth // int(blocks))
    case = Case(int(batch), length, None, precision)
    weights = inventory(network, "adamw").in_use(layers.start, layers.stop - 1)
    with Rehearsal(network, opened.inputs, case) as rehearsal:
        estimated = holding(weights, weights, rehearsal.kept(layers)).total
    strip(network.model, opened.anatomy, layers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    with Rehearsal(network, opened.inputs, case, fake=False, device=device) as rehearsal:
        for _ in range(2):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rehearsal.update(layers, optimizer)
    return {"estimated": estimated, "peak": torch.cuda.max_memory_allocated() if device == "cuda" else 0}


if __name__ == "__main__":
    sys.exit(main())
