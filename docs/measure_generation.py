"""Measures tokens per second of generation in blocks beside the unconverted network's own, and writes it to
docs/generation.json; regenerate.py makes a table of it.

    python docs/measure_generation.py            # all widths, about three minutes; nothing else should run
    python docs/measure_generation.py 512        # one width

Llamas of 12 layers with random weights and 8,192 tokens, greedy, one example, both with their caches, in turns.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dbconvert
from dbconvert.engine.convert import whole_network
from dbconvert.engine.generate import Decoding, Writer, can_cache
from dbconvert.engine.package import open_package
from dbconvert.recipe import SplitOptions

RESULTS = Path(__file__).resolve().parent / "generation.json"
LAYERS, BLOCKS, VOCABULARY = 12, 4, 8192
WIDTHS = (512, 768, 1024)
PROMPT, TOKENS, REPEATS = 128, 64, 5


def main() -> int:
    widths = [int(word) for word in sys.argv[1:]] or list(WIDTHS)
    torch.set_num_threads(1)
    rows = {str(width): measured(width) for width in widths}
    found = {
        "layers": LAYERS,
        "blocks": BLOCKS,
        "vocabulary": VOCABULARY,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread; torch {version('torch')}",
        "widths": {**(json.loads(RESULTS.read_text()).get("widths", {}) if RESULTS.exists() else {}), **rows},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measured(width: int) -> dict[str, Any]:
    """Tokens a second of both, in turns, and the median of their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        own, ours = made(Path(folder), LAYERS, width, BLOCKS)
    speeds: dict[str, list[float]] = {"unconverted": [], "in blocks": []}
    for _ in range(REPEATS):
        for name, write in (("unconverted", own), ("in blocks", ours)):
            speeds[name].append(tokens_per_second(write))
    ratio = statistics.median(b / a for a, b in zip(*speeds.values(), strict=True))
    return {"tokens_per_second": speeds, "ratio": ratio, "weights": weights_read(width)}


def weights_read(width: int) -> float:
    """Weights that a token of the network itself reads, over those of a token in blocks: what the ratio would be if
    nothing else took time. A layer's matrices are 16 width^2; the table of targets is read beside the head.
    """
    layers, head = LAYERS * 16 * width**2, VOCABULARY * width
    evaluations = BLOCKS + 1
    return (layers + head) / (layers / BLOCKS * evaluations + evaluations * head + (evaluations - 1) * head)


def made(folder: Path, layers: int, width: int, blocks: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What writes TOKENS tokens: the network itself, and its blocks."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        vocab_size=VOCABULARY, max_position_embeddings=1024, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    config.save_pretrained(folder / "m")
    dbconvert.split(str(folder / "m"), out=str(folder / "p"), options=SplitOptions(blocks=blocks))
    package = open_package(folder / "p")
    network = whole_network(package.plan, package.source()).eval()
    network.load(package.tensors(), where="package")
    writer = Writer(network, package.plan.preview.intervals(), Decoding(), torch.Generator())
    start = torch.randint(0, VOCABULARY, (1, PROMPT))
    if not can_cache(writer, start, lambda _: None):
        raise SystemExit("the blocks generate without a cache")

    def own() -> Any:
        return model.generate(
            start, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, use_cache=True, pad_token_id=0
        )

    return own, lambda: list(writer.tokens(start, TOKENS, cache=True))


def tokens_per_second(write: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    write()
    return TOKENS / (time.perf_counter() - begun)


if __name__ == "__main__":
    sys.exit(main())
