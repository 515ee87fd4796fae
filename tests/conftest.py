"""What every test gets: few threads, a working directory and a cache of its own, no network."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_MODULES_CACHE", str(Path(tempfile.gettempdir()) / "dbconvert-tests-modules"))
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def one_thread():
    """For networks so small that a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DBCONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path
