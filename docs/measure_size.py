"""Measures what docs/size.md says, and writes it to docs/size.json; regenerate.py makes the tables of it.

    python docs/measure_size.py            # what size.json lacks
    python docs/measure_size.py --fresh    # everything again (some minutes)

A 70B-class network is inspected and planned from its configuration alone, in a process of its own, three times.
Then, for some families, what autograd keeps of an update on real tensors stands beside what `estimate` says.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "size.json"
REPEATS = 3
LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
COMMANDS = {
    "imports alone": None,
    "inspect": ["inspect", "LLAMA"],
    "split --dry-run": ["split", "LLAMA", "--blocks", "8", "--dry-run"],
    "estimate": ["estimate", "LLAMA", "--memory", "80GB", "--precision", "bf16"],
}
IN_ITS_OWN_PROCESS = """
import os, re, sys
from pathlib import Path
from dbconvert.cli.main import guarded
if sys.argv[1:]:
    guarded(sys.argv[1:], debug=True)
else:
    import gc
    gc.set_threshold(100_000, 50, 50)  # as the command does
    from dbconvert.engine import estimate, split
    from transformers import LlamaForCausalLM
    gc.freeze()
sys.stdout.flush()
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print("peak", peak, file=sys.stderr)
"""
TEXT = {"vocab_size": 8000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {**TEXT, "intermediate_size": 688, "num_key_value_heads": 2}),
    "BERT": ("BertConfig", "BertForMaskedLM", {**TEXT, "intermediate_size": 1024}),
    "Mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**TEXT, "intermediate_size": 512, "num_key_value_heads": 2, "num_local_experts": 8},
    ),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 8000, "n_embd": 256, "n_layer": 4, "n_head": 4}),
    "ConvNeXt stage": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [128], "depths": [4], "num_stages": 1, "num_labels": 100},
    ),
    "ViT (Transformers)": (
        "ViTConfig",
        "ViTForImageClassification",
        {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768},
    ),
}
BY_HAND = "ViT (examples/vit.py)"
PRECISIONS = ("fp32", "bf16")


def main() -> int:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and "--fresh" not in sys.argv else {}
    results.setdefault("versions", {name: version(name) for name in ("dbconvert", "torch", "transformers")})
    results.setdefault("machine", f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "llama-70b"
        large.mkdir()
        (large / "config.json").write_text(json.dumps(LLAMA_70B))
        for name, command in COMMANDS.items():
            if name not in results.setdefault("70b", {}):
                arguments = [str(large) if word == "LLAMA" else word for word in command or []]
                results["70b"][name] = [measured(arguments) for _ in range(REPEATS)]
                save(results)
        for name in [BY_HAND, *FAMILIES]:
            for precision in PRECISIONS:
                if precision not in results.setdefault("activations", {}).setdefault(name, {}):
                    results["activations"][name][precision] = compared(name, precision, Path(folder))
                    save(results)
    return 0


def save(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def measured(arguments: list[str]) -> dict[str, float]:
    """Wall time, CPU time (s), peak resident memory (MB) and the load of the machine when it started."""
    load, before, start = os.getloadavg()[0], os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", IN_ITS_OWN_PROCESS, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    peak = int(done.stderr.split()[-1]) * 1024 / 1e6
    return {"wall": round(wall, 2), "cpu": round(cpu, 2), "peak_mb": round(peak), "load": round(load, 2)}


def compared(name: str, precision: Any, folder: Path) -> dict[str, dict[str, int]]:
    """Bytes that autograd keeps, on real tensors and as estimated: end-to-end, half the layers, one layer."""
    import torch
    import transformers

    from dbconvert.engine.estimate import as_one_block, with_usual_length
    from dbconvert.engine.opening import open_and_analyse
    from dbconvert.engine.rehearsal import Case, Rehearsal
    from dbconvert.events import silent

    torch.set_num_threads(1)
    if name == BY_HAND:
        source, length = str(ROOT / "examples" / "vit.py") + ":vit_cifar100", None
    else:
        kind, architecture, options = FAMILIES[name]
        getattr(transformers, kind)(**options, architectures=[architecture]).save_pretrained(folder / name)
        source, length = str(folder / name), 256 if "vocab_size" in options else None
    opened = open_and_analyse(source, stack=None, weights=None, seed=0, report=silent)
    network, depth = as_one_block(opened), opened.anatomy.depth
    case = with_usual_length(opened, Case(batch=8, length=length, precision=precision))
    found = {}
    runs = {"end-to-end": None, "2 blocks": range(depth // 2), f"{depth} blocks": range(1)}
    for label, layers in runs.items():
        both = {}
        for fake in (False, True):
            with Rehearsal(network, opened.inputs, case, fake=fake) as rehearsal:
                both["estimated" if fake else "measured"] = rehearsal.kept(layers)
        found[label] = both
    return found


if __name__ == "__main__":
    sys.exit(main())
