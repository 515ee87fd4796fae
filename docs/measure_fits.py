"""A network that does not fit into memory end-to-end trains in blocks: measured on a CPU, written to docs/fits.json.

    python docs/measure_fits.py            # what fits.json lacks (some minutes)
    python docs/measure_fits.py --fresh    # everything again
    python docs/measure_fits.py --smoke    # a tiny network, printed and not kept

A Llama of random weights and about 100 million parameters is split into four blocks. Then rows, each in a process of
its own, train a few updates a block on bytes: in blocks with `train.inactive=disk`, with all blocks resident, and
end-to-end. Told is the most anonymous memory (RssAnon) that the process holds above its level after imports, beside
what `dbconvert estimate` says. Two more rows have a limit of LIMIT times what `estimate` says for blocks away, which
the system enforces on the process's data (RLIMIT_DATA): blocks train in it, end-to-end training does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "fits.json"
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "vocab_size": 260,
    "max_position_embeddings": 256,
}
TINY = {**LLAMA, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
BLOCKS, BATCH, LENGTH, STEPS, LIMIT = 4, 2, 128, 2, 1.15
AWAY = ["train.inactive=disk", "train.order=rotate", f"train.steps_per_turn={STEPS}"]
END_TO_END = ["train.method=end-to-end"]
ROWS = {
    "blocks away": AWAY,
    "blocks away, limited": AWAY,
    "end-to-end, limited": END_TO_END,
    "blocks resident": [],
    "end-to-end": END_TO_END,
}
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 400


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row is not None:
        sys.stdout.write(json.dumps(row(*given.row)) + "\n")
        return 0
    results: dict[str, Any] = {"rows": {}}
    if RESULTS.exists() and not (given.fresh or given.smoke):
        results = json.loads(RESULTS.read_text())
    results["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    results["versions"] = {name: version(name) for name in ("dbconvert", "torch", "transformers")}
    with tempfile.TemporaryDirectory() as folder:
        estimated = prepare(Path(folder), TINY if given.smoke else LLAMA, results)
        for name in ROWS:
            if name in results["rows"]:
                continue
            limit = int(LIMIT * estimated["blocks away"]) if "limited" in name else 0
            found = run([sys.executable, __file__, "--row", name, str(limit)], Path(folder))
            told = json.loads(found.splitlines()[-1])
            expected = estimated[name.removesuffix(", limited")]
            results["rows"][name] = {**told, "limit": limit, "estimate": expected}
            results["rows"][name]["ratio"] = round(told["peak"] / expected, 3)
            if not given.smoke:
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if given.smoke:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


def prepare(folder: Path, config: dict[str, Any], results: dict[str, Any]) -> dict[str, int]:
    """Writes the network's folder, its package and the text; what `estimate` says, in bytes, by the name of the row."""
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps(config))
    (folder / "text.txt").write_text(TEXT)
    command = str(Path(sys.executable).with_name("dbconvert"))
    run([command, "split", "llama", "--blocks", str(BLOCKS), "-o", "package"], folder)
    sizes = ["--batch", str(BATCH), "--length", str(LENGTH)]
    told = json.loads(run([command, "estimate", "llama", *sizes, "--json"], folder))
    held = {
        (one["blocks"], update["inactive"]): update
        for one in told["rows"]
        for update in one["updates"]
        if not update["checkpointing"]
    }
    rows = {
        "blocks away": held[BLOCKS, "away"],
        "blocks resident": held[BLOCKS, "resident"],
        "end-to-end": held[None, "resident"],
    }
    results["estimate"], results["config"] = rows, config
    results["case"] = {"blocks": BLOCKS, "batch": BATCH, "length": LENGTH, "steps": STEPS}
    return {name: one["total"] for name, one in rows.items()}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def row(name: str, limit: str) -> dict[str, Any]:
    """Trains in this process; the most anonymous memory that it took above its level after imports, in bytes."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    import dbconvert
    from dbconvert.engine import train  # noqa: F401
    from dbconvert.errors import DBConvertError

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    peak = [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], held("RssAnon"))
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    before = held("RssAnon")
    if int(limit):
        most = held("VmData") + int(limit)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    begun, outcome = time.perf_counter(), "trained"
    data = ["data.source=text.txt", "data.tokenizer=byte", f"data.length={LENGTH}", "data.validation=null"]
    sizes = [f"train.steps={STEPS}", f"train.batch={BATCH}", "train.checkpoint_every=0", "train.cpu=true"]
    try:
        dbconvert.train("package", overrides=[*data, *sizes, *ROWS[name]], out=name.replace(" ", "-"))
    except DBConvertError as error:
        outcome = str(error)
    return {"outcome": outcome, "peak": peak[0] - before, "seconds": round(time.perf_counter() - begun, 1)}


def held(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what + ":"))


if __name__ == "__main__":
    sys.exit(main())
