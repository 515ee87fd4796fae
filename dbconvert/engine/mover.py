"""Moves blocks to the training device and away: only the one that trains is there, with its optimiser state.

A parameter keeps its identity; its data is the tensor in the store while its block is away, and a copy of that on the
device while it is there. So weights can be read and saved wherever they are. On a CPU the device is ordinary memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.stores import HostStore, Store
from dbconvert.engine.units import Unit
from dbconvert.errors import UsageError

CPU = torch.device("cpu")
Pairs = list[tuple[Tensor, Tensor]]
"""(where it lies while it is away, what there is of it on the device)."""


@dataclass
class Mover:
    """Keeps the active block on the device, and one more while that only runs forward.

    Args:
        homes: every block's parameters in the store, by key. The network's data are these already.
        prefetch: a thread brings the next block while the active one trains, on a stream of its own, and takes the one
            before it away; the device holds the parameters and optimiser state of two blocks then.

    Attributes:
        parameters: every block's, by key.
        kept: every block's optimiser state in the store, once it has been away.
        units: what has an optimiser, by block.
        active: the block that trains. guest: one that only runs.
        moves: how many blocks have been brought, guests included.
    """

    network: BlockwiseNetwork
    homes: dict[int, dict[str, Tensor]]
    store: Store
    prefetch: bool = False
    parameters: dict[int, dict[str, nn.Parameter]] = field(init=False)
    kept: dict[int, dict[str, Tensor]] = field(init=False, default_factory=dict)
    units: Mapping[int, Unit] = field(init=False, default_factory=dict)
    device: torch.device = field(init=False, default=CPU)
    active: int | None = field(init=False, default=None)
    guest: int | None = field(init=False, default=None)
    moves: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.parameters = block_parameters(self.network)
        self.worker = ThreadPoolExecutor(1, "mover") if self.prefetch else None
        self.ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self.behind: Future[None] | None = None
        self.network.bring = self.need

    def begin(self, units: Mapping[int, Unit], device: torch.device) -> None:
        """Puts what no block owns, and all buffers, on the device, to stay."""
        self.units, self.device = units, device
        if device.type == "cuda":
            self.training, self.copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.settle_rest(device)

    def settle_rest(self, device: torch.device) -> None:
        moved = {id(p) for parameters in self.parameters.values() for p in parameters.values()}
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            if id(tensor) not in moved:
                tensor.data = tensor.data.to(device)

    # -- which block is there -------------------------------------------------------------------------------------

    def activate(self, block: int, following: int | None = None) -> None:
        """Brings the block that trains next, with its optimiser state, and takes away the one that did.

        Args:
            following: the block that will train after it.
        """
        if block == self.active:
            return
        self.dismiss()
        leaving = self.release()
        if self.ahead is not None and self.ahead[0] == block and self.worker is not None:
            arrived = self.ahead[1].result()
            self.behind = self.worker.submit(self.keep, leaving)
        else:
            self.settle()
            self.keep(leaving)
            arrived = self.fetch(block)
        self.ahead = None
        self.attach(block, arrived)
        self.active = block
        if following is not None:
            self.store.expect(stored_name(following))
            self.store.expect(state_name(following))
            if self.worker is not None:
                self.ahead = following, self.worker.submit(self.fetch, following)

    def activate_unit(self, unit: Unit) -> None:
        """Brings the block of a unit; one that is no block's is always there."""
        for block, other in self.units.items():
            if other is unit:
                self.activate(block)

    def need(self, block: int) -> None:
        """Makes sure that a block can run forward: brings its parameters alone where it is not there."""
        if block in (self.active, self.guest):
            return
        self.dismiss()
        self.settle()
        arrived = self.copies(self.homes[block])
        for key, parameter in self.parameters[block].items():
            parameter.data = arrived[key]
        self.guest = block

    def dismiss(self) -> None:
        """Sends the guest away, who has not changed."""
        if self.guest is not None:
            for key, parameter in self.parameters[self.guest].items():
                parameter.data = self.homes[self.guest][key]
            self.guest = None

    def settle(self) -> None:
        """Waits until what is on its way has come to the store, so that it can be read there."""
        if self.behind is not None:
            self.behind.result()
            self.behind = None

    def at_rest(self) -> Mover:
        """Itself, with every block away."""
        self.dismiss()
        self.settle()
        self.keep(self.release())
        if self.ahead is not None:
            self.ahead[1].result()
            self.ahead = None
        return self

    def end(self) -> None:
        """Takes every block away, and the rest back to the CPU."""
        self.at_rest()
        if self.worker is not None:
            self.worker.shutdown()
        self.settle_rest(CPU)
        self.network.bring = None

    def away(self) -> Iterator[Tensor]:
        """All that lies in the store."""
        for tensors in (*self.homes.values(), *self.kept.values()):
            yield from tensors.values()

    # -- copies ---------------------------------------------------------------------------------------------------

    def release(self) -> Pairs:
        """Puts the homes of the active block in the places of what is on the device, which is yet to be kept."""
        block, self.active = self.active, None
        if block is None:
            return []
        pairs = []
        for key, parameter in self.parameters[block].items():
            home = self.homes[block][key]
            pairs.append((home, parameter.data))
            parameter.data = home
        if block in self.units:
            found: dict[str, Tensor] = {}
            exchange(self.units[block], found.setdefault)
            kept = self.room_for(block, found)
            pairs += [(kept[place], tensor) for place, tensor in found.items()]
            exchange(self.units[block], lambda place, _: kept[place])
        return pairs

    def room_for(self, block: int, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where a block's optimiser state lies: optimisers make it in their first update."""
        there = self.kept.get(block, {})
        if outlines(there) != outlines(found):
            there = self.kept[block] = self.store.room(state_name(block), found)
        return there

    def keep(self, pairs: Pairs) -> None:
        """Copies to the store, and forgets what was on the device."""
        with self.on_own_stream():
            for home, there in pairs:
                home.copy_(there, non_blocking=True)
        pairs.clear()

    def fetch(self, block: int) -> dict[str, Tensor]:
        """A block's parameters and optimiser state on the device."""
        return self.copies({**self.homes[block], **self.kept.get(block, {})})

    def copies(self, homes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrived = {key: torch.empty_like(home, device=self.device) for key, home in homes.items()}
        with self.on_own_stream():
            for key, home in homes.items():
                arrived[key].copy_(home, non_blocking=True)
        self.moves += 1
        return arrived

    @contextmanager
    def on_own_stream(self) -> Iterator[None]:
        """Copies on CUDA wait for what the training has queued, overlap with what it queues later, and are done at the
        end."""
        if self.device.type != "cuda":
            yield
            return
        self.copying.wait_stream(self.training)
        with torch.cuda.stream(self.copying):
            yield
        self.copying.synchronize()

    def attach(self, block: int, arrived: dict[str, Tensor]) -> None:
        for key, parameter in self.parameters[block].items():
            parameter.data = arrived[key]
        if block in self.units:
            exchange(self.units[block], arrived.get)


# -- what moves -------------------------------------------------------------------------------------------------------


def stored_name(block: int) -> str:
    return f"block-{block}"


def state_name(block: int) -> str:
    return f"block-{block}.optimizer"


def block_parameters(network: BlockwiseNetwork) -> dict[int, dict[str, nn.Parameter]]:
    """The parameters of every block that is in memory, by key.

    Raises:
        UsageError: a parameter belongs to two blocks, or to one and the periphery.
    """
    names: dict[int, list[str]] = {}
    found: dict[int, dict[str, nn.Parameter]] = {block: {} for block in network.present}
    for name, parameter in network.model.named_parameters(remove_duplicate=False):
        owner = network.owner(name)
        first = names.setdefault(id(parameter), [name])[0]
        if network.owner(first) != owner:
            raise UsageError(
                f"{first} and {name} are one parameter, of parts that are not trained together",
                hint="train with train.inactive=resident",
            )
        if owner is not None and first == name:
            found[owner][name] = parameter
    return found


def outlines(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}


def exchange(unit: Unit, change: Callable[[str, Tensor], Tensor]) -> None:
    """Replaces every tensor of a unit's optimiser state; single numbers stay where the optimiser has them.

    Args:
        change: of a name that is the tensor's own, and the tensor.
    """
    for key, parameter in unit.parameters.items():
        state: dict[str, Any] = unit.optimizer.state.get(parameter, {})
        for slot, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[slot] = changed(value, change, f"{key}|{slot}")


def changed(value: Tensor, change: Callable[[str, Tensor], Tensor], place: str) -> Tensor:
    """A tensor with `change` done to it, or to what it is made of: 8-bit state has its scales beside it."""
    if not hasattr(value, "__tensor_flatten__"):
        return change(place, value)
    kind: Any = type(value)
    names, context = value.__tensor_flatten__()
    parts = {name: changed(getattr(value, name), change, f"{place}|{name}") for name in names}
    made: Tensor = kind.__tensor_unflatten__(parts, context, value.size(), value.stride())
    return made


@contextmanager
def on_device(network: BlockwiseNetwork, device: torch.device, *, whole: bool = False) -> Iterator[None]:
    """Meanwhile a network in the CPU's memory runs on a device: the periphery and whichever block runs are there.

    Args:
        whole: all blocks are, for a baseline.
    """
    if device == CPU:
        yield
    elif whole:
        network.to(device)
        try:
            yield
        finally:
            network.to(CPU)
    else:
        homes = {b: {k: p.data for k, p in own.items()} for b, own in block_parameters(network).items()}
        mover = Mover(network, homes, HostStore(pinned=False))
        mover.begin({}, device)
        try:
            yield
        finally:
            mover.end()
