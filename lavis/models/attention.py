"""Causal attention inside each document of a packed row, in place of a masked T x T square.

A document may begin with a prefix that is the same for all: its keys and values are given, and its
queries are not part of the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "lavis_packed"
"""Name of the implementation, for ``config._attn_implementation``."""

_SHORT = 512  # tokens; longer documents' probabilities would take too much memory
_FEW = 64  # queries of a turn of chat; with more, the fused kernel wins

KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Documents:
    """What attention must know of a packed row.

    Attributes:
        lengths: tokens of each document in the row, T in all.
        prefix: each layer's keys and values, (1, heads, P, head_dim), of the P tokens that stand
            before every document; empty without.
        square: mask the square over all documents instead of attending apart.
    """

    lengths: tuple[int, ...]
    prefix: tuple[KeysAndValues, ...] = ()
    square: bool = False

    @property
    def prefix_length(self) -> int:
        """P."""
        return self.prefix[0][0].shape[2] if self.prefix else 0

    def mask(self, length: int, device: torch.device) -> Tensor:
        """(N, P + N) bool: what a document's N tokens see of the prefix and of themselves."""
        if (length, device) not in self._masks:
            sees = torch.ones(
                length, self.prefix_length + length, dtype=torch.bool, device=device
            ).tril_(self.prefix_length)
            self._masks[length, device] = sees
        return self._masks[length, device]

    def square_mask(self, device: torch.device) -> Tensor:
        """(T, P + T) bool: what each token of the row sees."""
        if device not in self._squares:
            own = torch.block_diag(
                *(torch.ones(n, n, dtype=torch.bool).tril_() for n in self.lengths)
            )
            before = torch.ones(len(own), self.prefix_length, dtype=torch.bool)
            self._squares[device] = torch.cat([before, own], 1).bool().to(device)
        return self._squares[device]

    def ends(self, device: torch.device, *, prefix: bool) -> Tensor:
        """(D + 1,) int32 cumulative lengths, with or without the prefix."""
        each = (n + self.prefix_length * prefix for n in self.lengths)
        return torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device)

    @cached_property
    def _masks(self) -> dict[tuple[int, torch.device], Tensor]:
        return {}

    @cached_property
    def _squares(self) -> dict[torch.device, Tensor]:
        return {}


@torch.compiler.disable  # every batch has other lengths, every layer another prefix
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    row_length: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within documents; without ``documents`` this is plain SDPA, or the same as products.

    Args:
        query: (1, heads, T, head_dim), the row's documents end to end; key and value alike.
        row_length: how many keys and values there are, if room for more follows them: zeros, or
            what was there before.

    Returns:
        (1, T, heads, head_dim), as Transformers' attention functions do.
    """
    if documents is None:
        if _is_turn(query, key, attention_mask) and scaling is not None and not dropout:
            length = key.shape[2] if row_length is None else row_length
            return _turn(query, key, value, attention_mask, scaling, length), None
        key, value = key[:, :, :row_length], value[:, :, :row_length]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    prefix = None
    if documents.prefix:
        keys, values = documents.prefix[module.layer_idx]  # type: ignore[index]
        prefix = (keys.to(key), values.to(value))
    attend = _choose(query, documents, dropout)
    return attend(query, key, value, documents, prefix, scaling, dropout), None


Attend = Callable[
    [Tensor, Tensor, Tensor, Documents, KeysAndValues | None, float | None, float], Tensor
]


def _choose(query: Tensor, documents: Documents, dropout: float) -> Attend:
    """The one place that says which kernel computes what."""
    if documents.square:
        return _square
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and half and not dropout:
        return _varlen
    return _each


def _square(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    prefix: KeysAndValues | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    key, value = _after(prefix, key, value)
    mask = documents.square_mask(query.device)
    return _sdpa(query, key, value, mask, scaling, dropout).transpose(1, 2)


def _each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    prefix: KeysAndValues | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """One document after the other: no kernel for packed rows on a CPU."""
    parts = (x.split(documents.lengths, dim=2) for x in (query, key, value))
    rows = []
    for q, k, v in zip(*parts, strict=True):
        k, v = _after(prefix, k, v)
        if _is_short(q, k) and scaling is not None and not dropout:
            rows.append(_products(q, k, v, documents.mask(q.shape[2], q.device), scaling))
        else:
            mask = None if prefix is None else documents.mask(q.shape[2], q.device)
            rows.append(_sdpa(q, k, v, mask, scaling, dropout))
    return torch.cat(rows, dim=2).transpose(1, 2)


def _is_short(query: Tensor, key: Tensor) -> bool:
    """Whether a document's attention is quicker as products than fused."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    same_heads = query.shape[1] == key.shape[1]
    return query.device.type == "cpu" and half and same_heads and query.shape[2] <= _SHORT


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    prefix: KeysAndValues | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """FlashAttention over variable lengths; its causal mask is aligned at the end of the keys."""
    from torch.nn.attention.varlen import varlen_attn

    if prefix is not None:
        parts = zip(*(x.split(documents.lengths, dim=2) for x in (key, value)), strict=True)
        pairs = [_after(prefix, k, v) for k, v in parts]
        key, value = (torch.cat(x, dim=2) for x in zip(*pairs, strict=True))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = max(documents.lengths)
    out: Any = varlen_attn(
        q,
        k,
        v,
        documents.ends(q.device, prefix=False),
        documents.ends(q.device, prefix=True),
        longest,
        longest + documents.prefix_length,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[None]


def _after(prefix: KeysAndValues | None, key: Tensor, value: Tensor) -> KeysAndValues:
    if prefix is None:
        return key, value
    return torch.cat([prefix[0], key], 2), torch.cat([prefix[1], value], 2)


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention as two matrix products, for short documents in half precision on a CPU.

    There PyTorch's fused kernel takes twice as long, most of it in the backward pass
    (``benchmarks/train_step.py``). The probabilities are kept: N x (P + N) for each head.
    """
    hidden = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    hidden.masked_fill_(~mask, -math.inf)
    scores = torch.baddbmm(
        hidden.expand(query.shape[1], -1, -1), query[0], key[0].transpose(1, 2), alpha=scaling
    )
    return (scores.softmax(-1) @ value[0])[None]


def _is_turn(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether few queries look at what came before, in half precision on a CPU."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    few = query.shape[2] == 1 or (query.shape[2] <= _FEW and mask is not None)
    same_heads = query.shape[1] == key.shape[1]
    return query.device.type == "cpu" and half and few and same_heads and not query.requires_grad


def _turn(
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
        scores[..., first:length].masked_fill_(~mask[..., first:], -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def document_lengths(document_ids: Tensor) -> tuple[int, ...]:
    """Tokens of each document of a packed row, (1, T) ids."""
    ends = (document_ids[0].diff().nonzero()[:, 0] + 1).tolist()
    return tuple(b - a for a, b in pairwise([0, *ends, document_ids.shape[1]]))


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
