"""Causal attention inside each document of a packed row, in place of a masked T x T square.

A document may begin with a prefix that is the same for all: its keys and values are given, and its
queries are not part of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lavis.common.device import is_ampere
from lavis.common.errors import ConfigError
from lavis.models.compute import cpu
from lavis.models.compute.masks import Asked, Documents, KeysAndValues, MaskRule, Masks, Softmax

__all__ = ["PACKED", "Documents", "KeysAndValues", "attend_all", "packed_attention"]

PACKED = "lavis_packed"
"""Name of the implementation, for ``config._attn_implementation``."""


# What layers pass along and attention has no use for. A window is the mask's business.
_UNUSED = {
    "cache", "cache_position", "logits_to_keep", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids",
    "return_dict", "sliding_window", "use_cache",
}  # fmt: skip


@torch.compiler.disable  # every batch has other lengths, every layer another prefix
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | MaskRule | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within documents; without ``documents`` this is plain SDPA, or the same as products.

    Args:
        query: (1, heads, T, head_dim), the row's documents end to end; key and value alike.
        attention_mask: a :class:`MaskRule` also says how many keys and values there are, if room
            for more follows them: zeros, or what was there before.
        softcap: see :class:`Softmax`.
        s_aux: the sinks there.

    Returns:
        (1, T, heads, head_dim), as Transformers' attention functions do.

    Raises:
        ConfigError: the family asks for something that would be left out.
    """
    softmax = Softmax(scaling, dropout, softcap, s_aux)
    if documents is None:
        length = key.shape[2]
        if isinstance(attention_mask, MaskRule):
            length = attention_mask.length
        seen = attend_all(module, query, key, value, attention_mask, softmax, length, **kwargs)
        return seen, None
    _refuse(kwargs, {"is_causal"} if kwargs.get("is_causal") else set())
    if isinstance(attention_mask, Tensor) or (
        attention_mask is None and kwargs.get("sliding_window") is not None
    ):
        raise ConfigError("this family's mask cannot be applied document by document")
    asked = Asked(module, query, key, value, attention_mask, softmax)
    if documents.keep is not None and (kept := documents.keep(asked)) is not None:
        return kept, None
    prefix = None
    if documents.prefix:
        keys, values = documents.prefix[asked.layer]
        prefix = (keys.to(key), values.to(value))
    masks = documents.causal if attention_mask is None else attention_mask.inside(documents)
    return _choose(asked, documents, masks)(asked, documents, prefix, masks), None


def _refuse(kwargs: dict[str, Any], known: set[str]) -> None:
    """Whatever a family passes changes the result, unless it is known not to."""
    for name, given in kwargs.items():
        off = given is None or (given is False and name != "is_causal")
        if not off and name not in _UNUSED | known:
            raise ConfigError(f"attention knows no {name!r}, which this family asks for")


def attend_all(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | MaskRule | None,
    softmax: Softmax,
    length: int,
    /,
    **kwargs: Any,
) -> Tensor:
    """Rows that are a document each: prompts, turns of chat; perhaps padded on the left.

    Returns:
        (B, T, heads, head_dim) of T queries on the first ``length`` of the keys.
    """
    _refuse(kwargs, {"is_causal", "position_bias"})
    if not softmax.fused:
        _refuse(kwargs, {"is_causal"})
        if isinstance(mask, MaskRule):
            mask = mask.explicit
        elif mask is None:
            n = query.shape[2]
            mask = torch.ones(n, length, dtype=torch.bool, device=query.device).tril_(length - n)
        out = _by_hand(query, key[:, :, :length], value[:, :, :length], mask, softmax)
        return out.transpose(1, 2)
    mask = mask.whole if isinstance(mask, MaskRule) else mask
    scaling, dropout = softmax.scaling, softmax.dropout
    plain = kwargs.get("position_bias") is None
    if cpu.is_turn(query, key, mask) and plain and scaling is not None and not dropout:
        return cpu.turn(query, key, value, mask, scaling, length)
    key, value = key[:, :, :length], value[:, :, :length]
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out


Attend = Callable[[Asked, Documents, KeysAndValues | None, Masks], Tensor]


def _choose(asked: Asked, documents: Documents, masks: Masks) -> Attend:
    """The one place that says which kernel computes what."""
    query, softmax = asked.query, asked.softmax
    if documents.square:
        return _square
    half = query.dtype in (torch.float16, torch.bfloat16)
    plain = softmax.fused and not softmax.dropout and masks.plain
    same = query.shape[-1] == asked.value.shape[-1]
    if query.device.type == "cuda" and half and plain and same and is_ampere(query.device):
        return _varlen
    return _each


def _square(
    asked: Asked, documents: Documents, prefix: KeysAndValues | None, masks: Masks
) -> Tensor:
    key, value = _after(prefix, asked.key, asked.value)
    mask = masks.square(key.device)
    return _sdpa(asked.query, key, value, mask, asked.softmax).transpose(1, 2)


def _each(asked: Asked, documents: Documents, prefix: KeysAndValues | None, masks: Masks) -> Tensor:
    """One document after the other: no kernel for packed rows on a CPU."""
    parts = (x.split(documents.lengths, dim=2) for x in (asked.query, asked.key, asked.value))
    softmax, rows = asked.softmax, []
    for q, k, v in zip(*parts, strict=True):
        k, v = _after(prefix, k, v)
        n, scaling = q.shape[2], softmax.scaling
        by_products = cpu.is_short(q) and softmax.fused and not softmax.dropout
        if by_products and scaling is not None:
            rows.append(cpu.products(q, k, v, masks.of(n, q.device), scaling))
        else:
            needed = prefix is not None or not masks.plain or not softmax.fused
            rows.append(_sdpa(q, k, v, masks.of(n, q.device) if needed else None, softmax))
    return torch.cat(rows, dim=2).transpose(1, 2)


def _varlen(
    asked: Asked, documents: Documents, prefix: KeysAndValues | None, masks: Masks
) -> Tensor:
    """FlashAttention over variable lengths; its causal mask is aligned at the end of the keys."""
    from torch.nn.attention.varlen import varlen_attn

    key, value = asked.key, asked.value
    layout = documents.layout(key.device)
    if prefix is not None:
        key, value = (
            p.index_select(2, layout.before).index_copy_(2, layout.own, x)
            for p, x in zip(prefix, (key, value), strict=True)
        )
    q, k, v = (x[0].transpose(0, 1) for x in (asked.query, key, value))
    longest = max(documents.lengths)
    out: Any = varlen_attn(
        q,
        k,
        v,
        layout.queries,
        layout.keys,
        longest,
        longest + documents.prefix_length,
        scale=asked.softmax.scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[None]


def _after(prefix: KeysAndValues | None, key: Tensor, value: Tensor) -> KeysAndValues:
    if prefix is None:
        return key, value
    return torch.cat([prefix[0], key], 2), torch.cat([prefix[1], value], 2)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softmax: Softmax
) -> Tensor:
    """(B, heads, N, head_dim); without a mask causal, which needs as many keys as queries."""
    if not softmax.fused and mask is not None:
        return _by_hand(query, key, value, mask, softmax)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=softmax.scaling,
        dropout_p=softmax.dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softmax: Softmax) -> Tensor:
    """The definition, for what no fused kernel knows; probabilities in fp32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if softmax.scaling is None else softmax.scaling
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if softmax.softcap is not None:
        scores = softmax.softcap * (scores / softmax.softcap).tanh()
    # Rows of padding see nothing: they must not become NaN, which keys and values would spread.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if softmax.sinks is not None:
        sinks = softmax.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value)
    return F.dropout(weights, softmax.dropout) @ value


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, MaskRule)
