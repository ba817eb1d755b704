"""Causal attention inside each document of a packed row, in place of a masked T x T square."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "lavis_packed"
"""Name of the implementation, for ``config._attn_implementation``."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within documents; without ``document_lengths`` this is plain SDPA.

    Args:
        query: (1, heads, T, head_dim), the row's documents end to end; key and value alike.
        document_lengths: tokens of each document, T in all.

    Returns:
        (1, T, heads, head_dim), as Transformers' attention functions do.
    """
    if document_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    documents = zip(*(x.split(document_lengths, dim=2) for x in (query, key, value)), strict=True)
    rows = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        for q, k, v in documents
    ]
    return torch.cat(rows, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
