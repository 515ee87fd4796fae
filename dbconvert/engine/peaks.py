"""The most memory that updates take, watched from beside them: of the process, and of a CUDA device."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path

import torch

from dbconvert.events import Advance, Event

STATUS = Path("/proc/self/status")
EVERY = 0.01
"""Seconds between two looks at the process."""
LATE = ("matplotlib.backends.backend_agg", "sklearn.datasets", "torch._dynamo", "transformers")
"""Libraries that a run imports when it needs them."""


def preload() -> None:
    """Imports them now, so that a run's memory is not that of libraries."""
    for name in LATE:
        importlib.import_module(name)


class Peaks:
    """A reporter of training that keeps, while it is entered, the peaks of its updates.

    What happens between updates, evaluations above all, is left out.

    Attributes:
        host: bytes of anonymous resident memory above what there was when this was made; None where the system
            does not tell.
        device: bytes that were allocated on the CUDA device, None without one.
    """

    def __init__(self, device: bool) -> None:
        self.host: int | None = None
        self.device: int | None = None
        self.on_device = device
        self.begun = anonymous()
        self.trains = False
        self.window = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def __enter__(self) -> Peaks:
        if self.begun is not None:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.begun is not None:
            self.thread.join()

    def look(self) -> None:
        while not self.ended.wait(EVERY):
            self.window = max(self.window, anonymous() or 0)

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Advance):
            self.trains = False
            return
        updated = self.trains and event.steps > 0  # the first one says where training goes on from
        self.trains = True
        if updated and self.begun is not None:
            self.host = max(self.host or 0, self.window - self.begun, (anonymous() or 0) - self.begun)
        self.window = 0
        if self.on_device:
            if updated:
                self.device = max(self.device or 0, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()


def anonymous() -> int | None:
    """RssAnon of this process in bytes: what it holds beside mapped files."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)
