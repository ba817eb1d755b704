"""Frozen bf16 layers on a CPU that has no bf16 instructions.

There PyTorch multiplies bf16 matrices at about an eighth of the fp32 rate, and in the layout of the
backward pass at less than a hundredth (`benchmarks/full_size.py` measures both). A frozen weight is
widened block by block instead: the products are fp32, the weight stays bf16 in memory, and no
gradient of it is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis.models.compute.head import OutputHead
from lavis.models.weights.files import final_dtype

_ROWS = 4096  # rows of a weight that are widened at a time: 64 MiB at 4096 columns
_MIN_TOKENS = 32  # below, PyTorch's own matrix-vector product is faster


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        if x.numel() // x.shape[-1] < _MIN_TOKENS:
            return F.linear(x, weight)
        wide = x.float()
        with torch.autocast("cpu", enabled=False):
            blocks = [F.linear(wide, w.float()).to(x.dtype) for w in weight.split(_ROWS)]
        return torch.cat(blocks, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        rows = grad.reshape(-1, grad.shape[-1])
        out = rows.new_zeros((len(rows), ctx.weight.shape[1]), dtype=torch.float32)
        for part, w in zip(rows.split(_ROWS, -1), ctx.weight.split(_ROWS), strict=True):
            out.addmm_(part.float(), w.float())
        return out.to(grad.dtype).view(*grad.shape[:-1], -1), None


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is not trained: the same values, rounded once to bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out = _Product.apply(x, self.weight)
        return out if self.bias is None else out + self.bias


def slow_in_bf16() -> bool:
    """Whether this CPU has no bf16 instructions."""
    return torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")


def widen_frozen_linears(module: nn.Module) -> int:
    """Replace frozen bf16 linear layers in place, on a CPU without bf16 instructions.

    Returns:
        How many were replaced; none on other devices and newer CPUs.
    """
    if not slow_in_bf16():
        return 0
    chosen = [
        m
        for m in module.modules()
        if type(m) in (nn.Linear, OutputHead)
        and m.weight.device.type == "cpu"
        and final_dtype(m.weight) == torch.bfloat16
        and not m.weight.requires_grad
    ]
    for linear in chosen:
        linear.__class__ = FrozenLinear
    return len(chosen)
