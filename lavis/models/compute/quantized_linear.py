"""Frozen linear layers that hold their weight in few bits and unpack it when it is used.

The products are those of the unpacked weight, in the precision of the input, so that a token's
result does not depend on what else is in its row. (LLM.int8 rounds the input, too, and chooses the
columns that it spares by all tokens of a row.)
"""

from __future__ import annotations

import importlib
import logging
import sys
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.gguf.dequant import dequantize as unpack

from lavis.models.compute.cpu import slow_in_bf16

_UNPACKED = 2**20  # weights of a .gguf file that are unpacked at a time, through fp32
_NF4_BLOCK = 64  # weights that share a scale (Dettmers et al. 2023)


class _Product(torch.autograd.Function):
    """x W^T + b that unpacks W again in the backward pass, rather than keep it until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.dequantize(grad.dtype), None


class QuantizedLinear(nn.Linear):
    """A linear layer with a frozen, packed weight.

    What is packed are buffers of bytes, which neither ``half()`` nor a sharding strategy touches.
    """

    packed: Tensor

    def __init__(self, shape: tuple[int, int], bias: Tensor | None, **packed: Tensor) -> None:
        """Take (out, in), a bias and the buffers of a format."""
        nn.Module.__init__(self)  # not that of nn.Linear, which makes a weight
        self.out_features, self.in_features = shape
        frozen = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", frozen)
        for name, tensor in packed.items():
            self.register_buffer(name, tensor.view(torch.uint8))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The packed bytes: adapters look here for their device."""
        return self.packed

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(out, in) weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and slow_in_bf16():
            with torch.autocast("cpu", enabled=False):
                return self.product(x.float()).to(x.dtype)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the precision of ``x``."""
        out: Tensor = _Product.apply(x, self)
        return out


class Int8Linear(QuantizedLinear):
    """8 bits a weight and one fp32 scale a row, of its largest magnitude."""

    scale: Tensor

    @classmethod
    def of(cls, linear: nn.Linear, device: torch.device) -> Int8Linear:
        """Round a layer's weight to the nearest of 255 levels, on ``device``."""
        weight = linear.weight.detach().to(device, torch.float32)
        scale = weight.abs().amax(1, keepdim=True) / 127
        levels = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
        packed = {"packed": levels.to(torch.int8), "scale": scale}
        return cls((linear.out_features, linear.in_features), linear.bias, **packed)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        levels = self.packed.view(torch.int8).float()
        return levels.mul_(self.scale.view(torch.float32)).to(dtype)


class NF4Linear(QuantizedLinear):
    """4-bit normal floats with an fp32 scale for 64 weights (QLoRA, Dettmers et al. 2023).

    Scales are not quantized in turn: 4.5 bits a weight. Quantized and multiplied by bitsandbytes,
    which on a card has kernels that never unpack the weight for few tokens.
    """

    scale: Tensor

    @classmethod
    def of(cls, linear: nn.Linear, device: torch.device) -> NF4Linear:
        """Round a layer's weight, on ``device``."""
        weight = linear.weight.detach().to(device).contiguous()
        quantize = _bitsandbytes().functional.quantize_4bit
        packed, state = quantize(weight, blocksize=_NF4_BLOCK, quant_type="nf4")
        shape = linear.out_features, linear.in_features
        return cls(shape, linear.bias, packed=packed, scale=state.absmax)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        # As one row: on a CPU bitsandbytes takes each row's blocks to begin anew.
        state = self._state(dtype, (1, self.out_features * self.in_features))
        weight: Tensor = _bitsandbytes().functional.dequantize_4bit(self.packed, state)
        return weight.view(self.out_features, self.in_features)

    def product(self, x: Tensor) -> Tensor:
        if self.in_features % _NF4_BLOCK:
            return super().product(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        state = self._state(x.dtype, (self.out_features, self.in_features))
        # Not its Linear4bit: on some CPUs that repacks the weight for good in a pass without
        # gradients, such as a prefix's, and no gradient goes through it from then on.
        out: Tensor = _bitsandbytes().matmul_4bit(x, self.packed, state, bias=bias)
        return out

    def _state(self, dtype: torch.dtype, shape: tuple[int, int]) -> Any:
        return _bitsandbytes().functional.QuantState(
            absmax=self.scale.view(torch.float32),
            shape=torch.Size(shape),
            blocksize=_NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )


class GgufLinear(QuantizedLinear):
    """The blocks of a ``.gguf`` file as they are stored.

    Attributes:
        kind: number of the block type (``ggml_type`` in ggml.h).
    """

    def __init__(
        self, shape: tuple[int, int], bias: Tensor | None, kind: int, packed: Tensor
    ) -> None:
        """Take (out, in), a bias and (out, bytes) rows of blocks."""
        super().__init__(shape, bias, packed=packed)
        self.kind = kind

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        weight = self.packed.new_empty((self.out_features, self.in_features), dtype=dtype)
        rows = max(1, _UNPACKED // self.in_features)
        for part, blocks in zip(weight.split(rows), self.packed.split(rows), strict=True):
            part.copy_(unpack(blocks, self.kind).view(part.shape))  # fp32, rounded once
        return weight


class OutlinedLinear(QuantizedLinear):
    """The bytes of a packed layer, on the meta device."""

    def __init__(self, linear: nn.Linear, bits: float) -> None:
        """Take a layer's place, with so many bits a weight."""
        count = int(linear.weight.numel() * bits / 8)
        packed = torch.empty(count, dtype=torch.uint8, device=linear.weight.device)
        super().__init__((linear.out_features, linear.in_features), linear.bias, packed=packed)

        self._unpacked = torch.float32 if bits == PACKED_BITS["int8"] else None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        shape = self.out_features, self.in_features
        return self.packed.new_empty(shape, dtype=self._unpacked or dtype).to(dtype)


def count_weights(module: nn.Module) -> int:
    """How many numbers a module multiplies by, packed ones too."""
    packed = (m for m in module.modules() if isinstance(m, QuantizedLinear))
    return sum(m.in_features * m.out_features for m in packed) + sum(
        p.numel() for p in module.parameters()
    )


PACKED_BITS = {"int8": 8.0, "nf4": 4 + 32 / _NF4_BLOCK}
KINDS: dict[str, type[Int8Linear] | type[NF4Linear]] = {"int8": Int8Linear, "nf4": NF4Linear}


def _bitsandbytes() -> Any:
    """bitsandbytes, without the code that it would download on some CPUs when it is imported."""
    if "bitsandbytes" not in sys.modules:
        installed = sys.modules.get("kernels")
        sys.modules["kernels"] = None  # type: ignore[assignment]
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # tells so
        try:
            importlib.import_module("bitsandbytes")
        finally:
            del sys.modules["kernels"]
            if installed is not None:
                sys.modules["kernels"] = installed
    return sys.modules["bitsandbytes"]
