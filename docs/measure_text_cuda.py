"""A 12-layer, 768-wide language model on CUDA with the paper's settings, written to docs/text_cuda.json.

    python docs/measure_text_cuda.py --minutes 25 wikitext2_valid.txt     # what text_cuda.json lacks
    python docs/measure_text_cuda.py --smoke some.txt                     # two small updates a row, on any machine

First FlexAttention against torch's own attention, forward and backward. Then recipes/ar_lm1b.yaml on the bytes of a
text file: four blocks with either attention and noise, end-to-end and the shallow control, each in a process of its
own, for equal layer evaluations: as many updates as the minutes allow, told by a first row of a few. Every row is saved
as it ends, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dbconvert

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "text_cuda.json"
BLOCKS, LENGTH, BATCH = 4, 256, 64
CALIBRATION = 12
ROWS = {
    "blocks": [],
    "blocks, noise auto": ["noise.rule=auto", "noise.sigma_data=null"],
    "end-to-end": ["train.method=end-to-end"],
    "shallow control, 3 layers": ["train.method=shallow"],
}
SPEED = {"blocks, flex": ["train.attention=flex"], "blocks, sdpa": ["train.attention=sdpa"]}


def main() -> int:
    given = arguments()
    if given.row is not None:
        sys.stdout.write(json.dumps(row(given)) + "\n")
        return 0
    if not torch.cuda.is_available() and not given.smoke:
        sys.stderr.write("no CUDA device: nothing was measured\n")
        return 1
    path = Path(tempfile.mkdtemp()) / "smoke.json" if given.smoke else RESULTS
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["versions"] = {name: version(name) for name in ("torch", "transformers")}
    results["device"] = "CPU" if given.smoke else torch.cuda.get_device_name()
    results["text"], results["batch"], results["length"] = Path(given.text).name, BATCH, LENGTH
    if "parity" not in results and not given.smoke:
        results["parity"] = parity()
        path.write_text(json.dumps(results, indent=1) + "\n")
    rows = results.setdefault("rows", {})
    for name in SPEED if not given.smoke else ():
        measure(rows, name, CALIBRATION, given, path, results)
    if "steps" not in results:
        results["steps"] = 2 if given.smoke else affordable(rows, given.minutes)
    for name in ROWS:
        measure(rows, name, results["steps"], given, path, results)
    if given.smoke:
        sys.stdout.write(path.read_text())
    return int(any("failed" in one for one in rows.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a text file")
    parser.add_argument("--minutes", type=float, default=25, help="for all rows together")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def affordable(rows: dict[str, Any], minutes: float) -> int:
    """Updates a block for which all rows take that long, half of it left for starting, evaluating and slower rows."""
    tokens = min(one["tokens_per_second"] for one in rows.values() if "failed" not in one)
    update = BATCH * LENGTH / tokens
    return max(1, int(minutes * 60 / 2 / len(ROWS) / BLOCKS / update))


def measure(
    rows: dict[str, Any], name: str, steps: int, given: argparse.Namespace, path: Path, results: dict[str, Any]
) -> None:
    """Runs a row in a process of its own and saves it, or why it failed."""
    if name in rows and "failed" not in rows[name]:
        return
    sys.stderr.write(f"{name}, {steps} updates a block\n")
    command = [sys.executable, __file__, given.text, "--row", name, "--steps", str(steps)]
    done = subprocess.run([*command, *["--smoke"] * given.smoke], capture_output=True, text=True, check=False)
    rows[name] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-2000:]}
    path.write_text(json.dumps(results, indent=1) + "\n")


def row(given: argparse.Namespace) -> dict[str, Any]:
    """One run: held-out figures, tokens a second (a row's median over its log lines), peak memory of the device."""
    overrides = [
        *({**SPEED, **ROWS}[given.row]),
        f"data.source={Path(given.text).resolve()}",
        *("data.tokenizer=byte", "data.config=null", "data.revision=null", "data.streaming=false"),
        f"train.steps={given.steps}",
        *("optimizer.warmup=0.05", "data.validation=null", "train.checkpoint_every=0", "log.every=4"),
        *(("train.batch=2", "data.length=32", "log.every=1") if given.smoke else (f"train.batch={BATCH}",)),
        *(() if given.smoke else ("train.precision=bf16",)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        result = dbconvert.train(str(ROOT / "recipes" / "ar_lm1b.yaml"), overrides=overrides, out=out)
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        rates = [line["examples_per_second"] for line in lines if "examples_per_second" in line]
        found = {
            "steps": given.steps,
            "tokens_per_second": round(statistics.median(rates) * (32 if given.smoke else LENGTH)),
            "peak_mb": round(torch.cuda.max_memory_allocated() / 2**20) if torch.cuda.is_available() else None,
            "activations_mb": round(max(unit.activations for unit in result.memory.units) / 1e6, 1),
        }
        if given.row not in SPEED:
            few = ["eval.draws=1", "eval.sigmas=1"] if given.smoke else ["eval.draws=4", "eval.sigmas=16"]
            found["metrics"] = dbconvert.evaluate(out, part="test", overrides=["eval.batch=16", *few]).metrics
    return found


def parity() -> dict[str, float]:
    """The largest difference of outputs and gradients between both attentions, over the largest value."""
    from dbconvert.graph.attention import attend
    from dbconvert.graph.two_streams import lasting, noisy_rows, two_stream_mask

    device, length = torch.device("cuda"), 200
    causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    numbers = torch.arange(length, device=device).div(70, rounding_mode="floor").expand(4, -1)
    documents = numbers[:, :, None] == numbers[:, None, :]
    masks = {
        "causal": lasting(length, device, causal=True, noisy=False),
        "documents": two_stream_mask(causal, documents),
        "noisy rows": noisy_rows(causal, documents),
    }
    found = {}
    for name, mask in masks.items():
        outcomes = []
        for kernel in ("sdpa", "flex"):
            torch.manual_seed(0)
            shapes = {"query": mask.shape[-2], "key": mask.shape[-1], "value": mask.shape[-1]}
            call = {k: torch.randn(4, 8, n, 64, device=device, requires_grad=True) for k, n in shapes.items()}
            out = attend(call, mask, kernel)
            out.square().sum().backward()  # type: ignore[no-untyped-call]
            outcomes.append([out, *(tensor.grad for tensor in call.values())])
        pairs = zip(*outcomes, strict=True)
        found[name] = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    return found


if __name__ == "__main__":
    sys.exit(main())
