"""Frozen bf16 layers: the same numbers as fp32 products of the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lavis.models.compute.cpu import FrozenLinear, widen_frozen_linears


@pytest.mark.parametrize("tokens", [1, 31, 32, 50])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradient(tokens: int, bias: bool) -> None:
    linear = nn.Linear(64, 5000, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, tokens, 5000, dtype=torch.bfloat16)
    wide = nn.Linear(64, 5000, bias=bias).requires_grad_(False)
    wide.load_state_dict({k: v.float() for k, v in linear.state_dict().items()})
    reference = x.detach().float().requires_grad_()
    expected = wide(reference)
    expected.backward(grad.float())

    linear.__class__ = FrozenLinear
    out = linear(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    out.backward(grad)
    assert x.grad is not None
    assert reference.grad is not None
    error = (x.grad.float() - reference.grad).norm() / reference.grad.norm()
    assert error < (0.005 if 2 * tokens >= 32 else 0.02)


def test_only_frozen_bf16_layers_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    layers[0].to(torch.bfloat16).requires_grad_(False)
    layers[1].to(torch.bfloat16)
    layers[2].requires_grad_(False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert widen_frozen_linears(layers) == 0
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert widen_frozen_linears(layers) == 1
    assert [type(layer) for layer in layers] == [FrozenLinear, nn.Linear, nn.Linear]
