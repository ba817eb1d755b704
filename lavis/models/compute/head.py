"""Output head and cross-entropy in one, without the logits of all positions at once.

For hidden states h, weight W and targets t the loss of a row is log-sum-exp(h W^T) - (h W^T)_t,
and its gradient for h is softmax(h W^T) W - W_t: both come from the same product, so the gradient
is computed in the forward pass, piece by piece, and no logits are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PIECE_BYTES = 64 * 2**20  # of logits at a time
_CACHED_ROWS = 4


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a linear head, summed over rows.

    Memory beside the result is bounded: 64 MiB of logits, whatever the number of rows. The
    gradient of ``weight`` is computed only if it learns.

    Args:
        hidden: (N, C).
        weight: (V, C), without bias.
        targets: (N,) int64.

    Returns:
        Scalar, fp32, nats.
    """
    dtype = autocast_dtype(hidden.device) or weight.dtype
    return _HeadLoss.apply(hidden, weight, targets, dtype)


class OutputHead(nn.Linear):
    """A language model's head, without bias, that also computes the loss.

    As a call of the module, so that a strategy which shards its weight gathers it for either.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., V) logits; with (N,) targets, :func:`head_loss` of (N, C)."""
        if targets is None:
            return super().forward(hidden)
        return head_loss(hidden, self.weight, targets)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What matrix products are computed in under autocast, or ``None`` without it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        needed, learns, *_ = ctx.needs_input_grad  # nothing is, where only the loss is wanted
        wide = weight.to(dtype)  # nothing is copied where they agree
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if learns else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        rows = min(len(hidden), max(1, _PIECE_BYTES // (dtype.itemsize * len(weight))))
        # Buffers for all pieces: fresh memory costs as much as the arithmetic. A few rows at a
        # time go through the passes over the vocabulary, while they are in a CPU's cache.
        logits = hidden.new_empty((rows, len(weight)), dtype=dtype)
        few = rows if hidden.device.type == "cuda" else min(rows, _CACHED_ROWS)
        scratch = hidden.new_empty((few, len(weight)), dtype=torch.float32)
        pieces = zip(hidden.split(rows), targets.split(rows), grad_hidden.split(rows), strict=True)
        with torch.autocast(hidden.device.type, enabled=False):
            for h, t, grad in pieces if rows else ():
                powers = torch.mm(h.to(dtype), wide.T, out=logits[: len(h)])
                totals = []
                for low, at in zip(powers.split(few), t.split(few), strict=True):
                    row = scratch[: len(low)].copy_(low)
                    at_target = row.gather(1, at[:, None])
                    top = row.amax(1, keepdim=True)
                    totals.append(row.sub_(top).exp_().sum(1, keepdim=True))
                    low.copy_(row)
                    loss += (totals[-1].log() + top - at_target).sum()
                total = torch.cat(totals)
                if needed:
                    # softmax W = (powers W) / total: the division needs no pass over the logits.
                    grad.copy_((powers @ wide).float().div_(total).sub_(wide[t]))
                if grad_weight is not None:
                    grad_weight.addmm_(powers.T.float(), h.float() / total)
                    grad_weight.index_add_(0, t, -h.float())
        ctx.save_for_backward(grad_hidden, *([] if grad_weight is None else [grad_weight]))
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_hidden, *rest = ctx.saved_tensors
        grad_weight = (rest[0] * grad).to(ctx.weight_dtype) if rest else None
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight, None, None
