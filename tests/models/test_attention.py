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
