"""The order of examples, as a function of seed, block and update: nothing to save, nothing to lose.

Every block reads the data in epochs of its own. Update k of block b uses the same examples whether the block
trains alone or among others, and whether the run was interrupted or not.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dbconvert.data.examples import Batch

CPU = torch.device("cpu")


class Data(Protocol):
    """Examples that are read in batches: arguments of a network by name, and labels under `LABEL`."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> Batch: ...

    def label_counts(self) -> Tensor:
        """How often each label occurs, [classes]."""


def derive(seed: int, *parts: object) -> int:
    """A 63-bit seed from a run's seed and whatever names the occasion."""
    text = repr((seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_all(value: int) -> None:
    """Seeds Python, NumPy and torch on every device."""
    random.seed(value)
    np.random.seed(value % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:  # the same, without a stack trace for each kind of device that is not there
        torch.default_generator.manual_seed(value)


def block_order(blocks: list[int], steps: int, order: str, steps_per_turn: int, seed: int) -> list[int]:
    """Which block each update of a run trains: every block `steps` times."""
    if order == "stagewise":
        return [block for block in blocks for _ in range(steps)]
    if order == "rotate":
        turns = -(-steps // steps_per_turn)
        lengths = [min(steps_per_turn, steps - t * steps_per_turn) for t in range(turns)]
        return [block for length in lengths for block in blocks for _ in range(length)]
    sequence = np.repeat(np.array(blocks), steps)
    np.random.default_rng(derive(seed, "order")).shuffle(sequence)
    return [int(block) for block in sequence]


class OrderedBatches(Sampler[list[int]]):
    """Indices of each update's batch, from update `start` on; this process's share of them.

    Args:
        order: the block of every update.
        rank, world: this process among all.
    """

    def __init__(
        self,
        examples: int,
        batch: int,
        order: list[int],
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.examples, self.batch, self.order, self.seed = examples, min(batch, examples), order, seed
        self.start, self.rank, self.world = start, rank, world

    def __len__(self) -> int:
        return len(self.order) - self.start

    def __iter__(self) -> Iterator[list[int]]:
        done: dict[int, int] = {}
        epochs: dict[int, tuple[int, list[int]]] = {}
        per_epoch = self.examples // self.batch
        for update, block in enumerate(self.order):
            k = done.get(block, 0)
            done[block] = k + 1
            if update < self.start:
                continue
            epoch, position = divmod(k, per_epoch)
            if epochs.get(block, (-1, []))[0] != epoch:
                epochs[block] = (epoch, self.permutation(block, epoch))
            indices = epochs[block][1][position * self.batch : (position + 1) * self.batch]
            yield indices[self.rank :: self.world]

    def permutation(self, block: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive(self.seed, "data", block, epoch))
        permutation: list[int] = torch.randperm(self.examples, generator=generator).tolist()
        return permutation


def load_batches(
    examples: Data, sampler: Iterable[list[int]], workers: int, device: torch.device = CPU
) -> Iterable[Batch]:
    """A loader of whole batches, in pinned memory where they are copied to a CUDA device."""
    if not workers and device.type != "cuda":
        return (examples.__getitems__(indices) for indices in sampler)
    options: dict[str, Any] = {"persistent_workers": True} if workers else {}
    return DataLoader(
        examples,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=as_they_are,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        **options,
    )


def as_they_are(batch: Any) -> Any:
    """Batches come whole from `Data.__getitems__`."""
    return batch


class Spread:
    """At most `count` examples of a part, spread evenly over it."""

    def __init__(self, examples: Data, count: int) -> None:
        self.examples, self.count = examples, min(count, len(examples))

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.examples.__getitems__([i * len(self.examples) // self.count for i in indices])

    def label_counts(self) -> Tensor:
        return self.examples.label_counts()

    @property
    def characters_per_token(self) -> float | None:
        return getattr(self.examples, "characters_per_token", None)


def in_order(examples: Data, batch: int) -> Iterator[Batch]:
    """All examples once, in their order (evaluation)."""
    for start in range(0, len(examples), batch):
        yield examples.__getitems__(list(range(start, min(start + batch, len(examples)))))
