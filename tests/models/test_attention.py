"""Attention inside documents equals attention over the row with a block-diagonal mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lavis.models.attention import Documents, packed_attention


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("lengths", [[7], [1, 5, 3], [2, 2]])
def test_equals_the_masked_square(heads: int, kv_heads: int, lengths: list[int]) -> None:
    total = sum(lengths)
    query = torch.randn(1, heads, total, 8, requires_grad=True)
    key, value = (torch.randn(1, kv_heads, total, 8) for _ in range(2))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (documents[:, None] == documents) & torch.ones(total, total).tril().bool()
    wanted = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=heads != kv_heads
    )
    got, _ = packed_attention(
        nn.Module(), query, key, value, None, scaling=8**-0.5, documents=Documents(tuple(lengths))
    )
    torch.testing.assert_close(got, wanted.transpose(1, 2))
    weight = torch.randn_like(got)
    (grad,) = torch.autograd.grad((got * weight).sum(), query)
    (wanted_grad,) = torch.autograd.grad((wanted.transpose(1, 2) * weight).sum(), query)
    torch.testing.assert_close(grad, wanted_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("lengths", [[7], [1, 5, 3], [600, 2]])
def test_a_prefix_and_half_precision(dtype: torch.dtype, prefix: int, lengths: list[int]) -> None:
    """Apart equals the square in fp32; half precision is as near to it as its rounding allows."""
    torch.manual_seed(4)
    total = sum(lengths)
    exact = [torch.randn(1, 4, n, 8) for n in (total, total, total, prefix, prefix)]
    module = nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    results = []
    for square, precision in ((True, torch.float32), (False, dtype)):
        query, key, value, *before = (x.to(precision) for x in exact)
        query, key = query.requires_grad_(), key.requires_grad_()
        documents = Documents(tuple(lengths), (tuple(before),) if prefix else (), square)  # type: ignore[arg-type]
        out, _ = packed_attention(module, query, key, value, None, 8**-0.5, documents=documents)
        grads = torch.autograd.grad(out.float().square().sum(), (query, key))
        results.append((out.float(), *(g.float() for g in grads)))
    for wanted, got in zip(*results, strict=True):
        error = float((got - wanted).detach().norm() / wanted.detach().norm())
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)
