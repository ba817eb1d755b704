"""Attention inside documents equals attention over the row with a block-diagonal mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2Config
from transformers.masking_utils import causal_mask_function
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from lavis.models.compute import attention
from lavis.models.compute.attention import PACKED, Documents, packed_attention
from lavis.models.compute.masks import MaskRule


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("new", [1, 7, 64])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("room", [0, 56])
def test_a_turn_of_chat(dtype: torch.dtype, new: int, padding: int, room: int) -> None:
    """Few queries after a long past: as products what the fused kernel gives, padding included."""
    batch, heads, width, length = 1 + (padding > 0), 4, 16, 200
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, n, width, generator=draw).to(dtype) for n in (new, length, length)
    )
    along = F.pad(k, (0, 0, 0, room), value=3.0).transpose(2, 3).contiguous().transpose(2, 3)
    roomy = F.pad(v, (0, 0, 0, room), value=7.0)
    mask = torch.ones(batch, 1, new, length, dtype=torch.bool).tril_(length - new)
    mask[0, ..., :padding] = False
    rule = MaskRule(
        batch_size=batch, q_length=new, kv_length=length, q_offset=length - new,
        mask_function=causal_mask_function, attention_mask=mask[:, 0, -1] if padding else None,
    )  # fmt: skip
    assert (rule.whole is None) == (new == 1 and not padding)
    got, _ = packed_attention(torch.nn.Identity(), q, along, roomy, rule, scaling=0.25)
    wanted = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=mask, scale=0.25
    )
    assert got.dtype == dtype
    assert got.shape == (batch, new, heads, width)
    tolerance = 0.03 if dtype == torch.bfloat16 else 0.004
    assert (got.float() - wanted.transpose(1, 2)).abs().max() < tolerance


def test_each_documents_keys_follow_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the variable-length kernel is given, and the gradient through it."""
    given = {}

    def kernel(q: Any, k: Any, v: Any, ends_q: Any, ends_k: Any, *longest: int, **_: Any) -> Any:
        given.update(k=k, v=v, ends=(ends_q.tolist(), ends_k.tolist()), longest=longest)
        return k.sum() + 2 * v.sum() + q

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(attention, "_choose", lambda *_: attention._varlen)
    before = torch.tensor([10.0, 20.0]).view(1, 1, 2, 1), torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    key = torch.tensor([3.0, 4.0, 5.0, 6.0]).view(1, 1, 4, 1).requires_grad_()
    module = nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    documents = Documents((1, 3), (before,))
    out, _ = packed_attention(module, key, key, 7 * key, None, 1.0, documents=documents)
    assert given["k"].flatten().tolist() == [10, 20, 3, 10, 20, 4, 5, 6]
    assert given["v"].flatten().tolist() == [1, 2, 21, 1, 2, 28, 35, 42]
    assert given["ends"] == ([0, 1, 4], [0, 3, 8])
    assert given["longest"] == (3, 5)
    (grad,) = torch.autograd.grad(out[0, 0].sum(), key)
    assert grad.flatten().tolist() == [16, 15, 15, 15]  # 1 + 2 * 7, and itself as a query
    assert documents.layout(key.device) is documents.layout(key.device)  # for all layers


def test_a_real_layer_backward_through_the_variable_length_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_choose", lambda *_: attention._varlen)
    config = Qwen2Config(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
        num_key_value_heads=8, attn_implementation=PACKED,
    )  # fmt: skip
    with torch.device("meta"):
        before = torch.empty(1, 8, 22, 128, dtype=torch.bfloat16)
        layer = Qwen2DecoderLayer(config, 0).bfloat16().requires_grad_(False)
        x = torch.empty(1, 143, 4096, dtype=torch.bfloat16, requires_grad=True)
        angles = (torch.empty(1, 143, 128, dtype=torch.bfloat16),) * 2
    documents = Documents((100, 1, 42), ((before, before),))
    out = layer(x, position_embeddings=angles, attention_mask=None, documents=documents)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (grad.shape, grad.dtype) == (x.shape, torch.bfloat16)
