"""Low-rank adapters beside a frozen weight: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024).

PEFT lays the layers out; the arithmetic is here, because its own keeps adapters in the frozen
weight's type, multiplies them in half precision under autocast, and for DoRA holds the weight in
fp32 until the backward pass: the whole model, twice over.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

_ROWS = 1024  # rows of a weight that are in fp32 at a time: 44 MiB at 11,008 columns
_NAME = "default"  # of the only adapter, as PEFT has it


class _Adapted(torch.autograd.Function):
    """g (W x + s B A x) + b of W x + b and x, in fp32, rounded once; g is 1 without DoRA.

    Nothing of the weight's or of the output's size is kept in fp32 for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        with _fp32(x):
            low = x.flatten(0, -2).float() @ down.float().T
            more = scale * (low @ up.float().T)
            rows = base.flatten(0, -2).float()
            if gain is not None:
                # In this form a gain of 1 changes no bit.
                more = gain * more + (gain - 1) * (rows if bias is None else rows - bias)
            out = (rows + more).to(base.dtype).view(base.shape)
        ctx.scale, ctx.dtype = scale, base.dtype
        ctx.save_for_backward(None if gain is None else base, x, low, down, up, gain, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        base, x, low, down, up, gain, bias = ctx.saved_tensors
        scale, grad_gain = ctx.scale, None
        grad_base, grad = grads[0], grads[0].flatten(0, -2).float()
        with _fp32(x):
            if gain is not None:
                plain = base.flatten(0, -2).float() + scale * (low @ up.float().T)
                grad_gain = (grad * (plain if bias is None else plain - bias)).sum(0)
                grad = grad * gain
                grad_base = grad.to(ctx.dtype).view(base.shape)
            grad_up = scale * (grad.T @ low)
            grad_low = scale * (grad @ up.float())
            grad_down = grad_low.T @ x.flatten(0, -2).float()
            grad_x = (grad_low @ down.float()).to(x.dtype).view(x.shape)
        return grad_base, grad_x, grad_down.to(down), grad_up.to(up), grad_gain, None, None


class AdaptedLinear(PeftLinear):
    """A frozen linear layer with trainable fp32 adapters A (r, in), B (out, r) and scale s.

    LoRA's output is W x + b + s B A x. DoRA's is m (W x + s B A x) / |W + s B A| + b, with norms of
    rows that are constants to the gradient (its section 4.3). Dropout is of what A reads alone.
    The adapters' products are fp32, with autocast and without.
    """

    @classmethod
    def take_over(cls, layer: PeftLinear) -> None:
        """Make one of PEFT's layers this, in place; its adapters become fp32."""
        layer.__class__ = cls
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            part.float()
        if (magnitude := layer.magnitude) is not None:
            magnitude.data = layer.norms()  # PEFT's are rounded to the weight's type

    @property
    def magnitude(self) -> nn.Parameter | None:
        """m, (out,), of DoRA."""
        if _NAME not in self.lora_magnitude_vector:
            return None
        weight: nn.Parameter = self.lora_magnitude_vector[_NAME].weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type that the frozen layer gives."""
        base: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return base
        magnitude = self.magnitude
        gain = None if magnitude is None else magnitude.float() / self.norms()
        out: Tensor = _Adapted.apply(
            base,
            self.lora_dropout[_NAME](x),
            self.lora_A[_NAME].weight,
            self.lora_B[_NAME].weight,
            gain,
            None if gain is None else self.base_layer.bias,
            self.scaling[_NAME],
        )
        return out

    @torch.no_grad()
    def norms(self) -> Tensor:
        """|W + s B A| by rows, (out,) fp32; never zero."""
        weight, up = self.base_layer.weight, self.lora_B[_NAME].weight
        blocks = zip(weight.split(_ROWS), up.split(_ROWS), strict=True)
        return torch.cat([_norm(self._whole(w, u)) for w, u in blocks])

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """(out, in) fp32: what alone computes the same in place of ``weight`` and the adapters."""
        whole = self._whole(weight, self.lora_B[_NAME].weight)
        if (magnitude := self.magnitude) is None:
            return whole
        return whole * (magnitude.float() / _norm(whole))[:, None]

    def _whole(self, weight: Tensor, up: Tensor) -> Tensor:
        down = self.lora_A[_NAME].weight
        with _fp32(weight):
            return torch.addmm(weight.float(), up.float(), down.float(), alpha=self.scaling[_NAME])


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).clamp(min=torch.finfo(torch.float32).tiny)


def _fp32(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)
