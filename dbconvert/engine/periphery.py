"""Blocks with stems and readouts of their own: what these are called, and that weights fit their names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dbconvert.errors import DBConvertError
from dbconvert.graph.inject import PREFIX

OWN = f"{PREFIX}.periphery"


class OwnPeriphery(nn.Module):
    """One block's stem and readout: parameters and buffers under the network's names, with / for the dots."""

    def __init__(self, tensors: Mapping[str, Tensor], *, copied: bool = True) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(
                    name.replace(".", "/"), nn.Parameter(tensor.detach().clone() if copied else tensor.detach())
                )
            else:
                self.register_buffer(name.replace(".", "/"), tensor.detach().clone())

    def tensors(self) -> dict[str, Tensor]:
        own = {**self._parameters, **self._buffers}
        return {name.replace("/", "."): tensor for name, tensor in own.items() if tensor is not None}


def own_key(block: int, key: str) -> str:
    """Name of a block's own copy of a stem or readout tensor."""
    return f"{OWN}.{block}.{key.replace('.', '/')}"


def check_keys(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or unknown:
        parts = [f"missing: {shortened(missing)}"] * bool(missing) + [f"unknown: {shortened(unknown)}"] * bool(unknown)
        raise DBConvertError("the weights do not fit the network", where=where, why="; ".join(parts))
    for key, tensor in wanted.items():
        if tuple(given[key].shape) != tuple(tensor.shape):
            raise DBConvertError(
                f"{key} has shape {list(given[key].shape)}, and the network wants {list(tensor.shape)}",
                where=where,
            )


def shortened(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
