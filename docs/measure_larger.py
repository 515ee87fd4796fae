"""Measures text on files of your own, longer than docs/measure_text.py does, and writes it to docs/larger.json.

    python docs/measure_larger.py tinyshakespeare.txt wikitext2_valid.txt      # what larger.json lacks

The recipe ar_text_tiny on every file, cut into 90 / 5 / 5 % by position, with three times the updates, one seed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure_text import ROOT, ROWS, machine, trained

RESULTS = ROOT / "docs" / "larger.json"
CHOSEN = ("auto", "edm", "end-to-end", "shallow control, 2 layers")
STEPS = 1500
SEED = "0"


def main() -> int:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else machine()
    with tempfile.TemporaryDirectory() as folder:
        for file in map(Path, sys.argv[1:]):
            for name in CHOSEN:
                rows = results.setdefault("files", {}).setdefault(file.name, {})
                if name not in rows:
                    sys.stderr.write(f"{file.name}, {name}\n")
                    given = [*ROWS[name], f"data.source={file.resolve()}", f"train.steps={STEPS}"]
                    rows[name] = {SEED: trained(given, SEED, Path(folder))}
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
