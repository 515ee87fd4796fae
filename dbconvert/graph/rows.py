"""A linear map of two rows that reads its weight once: on a CPU torch's own takes one row after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LINEAR = F.linear


def of_two_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; where that is of two rows, of float32 and on a CPU, as the transpose of weight @ rows^T."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype == input.dtype == torch.float32
    if not plain or not weight.is_cpu or input.numel() != 2 * weight.shape[-1]:
        return LINEAR(input, weight, bias)
    out = torch.mm(weight, input.reshape(2, -1).t()).t().contiguous()
    return (out if bias is None else out + bias).view(*input.shape[:-1], len(weight))
