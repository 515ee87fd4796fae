"""What every test gets: one thread, a working directory and a cache of its own, no network."""

import os
import tempfile

import pytest
import torch

MODULES = tempfile.TemporaryDirectory(prefix="dbconvert-tests-modules-")
os.environ["HF_MODULES_CACHE"] = MODULES.name
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """As the processes that tests start: other numbers of threads give other bits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DBCONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path
