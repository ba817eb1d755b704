"""What serves half precision on a CPU, and nothing else: attention and frozen layers.

On a CPU without bf16 instructions PyTorch multiplies bf16 matrices at about an eighth of the fp32
rate, and in the layout of the backward pass at less than a hundredth (`benchmarks/full_size.py`
measures both). A frozen weight is widened block by block instead: the products are fp32, the weight
stays bf16 in memory, and no gradient of it is computed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis.models.compute.head import OutputHead
from lavis.models.weights.files import final_dtype

_ROWS = 4096  # rows of a weight that are widened at a time: 64 MiB at 4096 columns
_MIN_TOKENS = 32  # below, PyTorch's own matrix-vector product is faster
_SHORT = 512  # tokens; longer documents' probabilities would take too much memory
_FEW = 64  # queries of a turn of chat; with more, the fused kernel wins


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


def is_short(query: Tensor) -> bool:
    """Whether a document's attention is quicker as products than fused."""
    return _half(query) and query.shape[2] <= _SHORT


def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention as two matrix products, for short documents in half precision on a CPU.

    There PyTorch's fused kernel takes twice as long, most of it in the backward pass
    (``benchmarks/train_step.py``). The probabilities are kept: N x (P + N) for each head.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    hidden = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    hidden.masked_fill_(~mask, -math.inf)
    scores = torch.baddbmm(
        hidden.expand(query.shape[1], -1, -1), query[0], key[0].transpose(1, 2), alpha=scaling
    )
    return (scores.softmax(-1) @ value[0])[None]


def is_turn(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether few queries look at what came before, in half precision on a CPU."""
    few = query.shape[2] == 1 or (query.shape[2] <= _FEW and mask is not None)
    same_heads = query.shape[1] == key.shape[1]
    return _half(query) and few and same_heads and not query.requires_grad


def turn(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, length: int
) -> Tensor:
    """(B, N, heads, head_dim) of N new tokens, as two matrix products.

    PyTorch's fused kernel takes two and a half times as long for 40 queries on 2,800 keys, and four
    times for one query, if the keys lie as :mod:`lavis.chat.cache` keeps them. The room after the
    keys takes part: products of sizes that return need no new code and no copies.
    """
    scores = (query * scaling) @ key.transpose(2, 3)
    scores[..., length:] = -math.inf
    if mask is not None:
        # Without padding, only new tokens are hidden, from those before them.
        first = length - query.shape[2] if bool(mask[..., : -query.shape[2]].all()) else 0
        # The smallest number, not minus infinity: a row of padding sees nothing, and its NaN would
        # spread through its keys and values.
        hidden = torch.finfo(scores.dtype).min
        scores[..., first:length].masked_fill_(~mask[..., first:], hidden)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _half(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float16, torch.bfloat16)
