"""Any causal language model of Transformers behind one contract."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from lavis.common.errors import ConfigError
from lavis.models.compute.attention import PACKED
from lavis.models.compute.head import OutputHead
from lavis.models.compute.masks import Documents, KeysAndValues

logger = logging.getLogger(__name__)

OTHER = "take a language model of another family"
"""What to do about a family that cannot be computed here."""


class CausalLM(nn.Module):
    """A :class:`lavis.models.contracts.LanguageModel` around a stock ``...ForCausalLM``.

    :func:`lavis.models.language.proof.prove` finds out what the family can do, and how its logits
    come from its head.

    Attributes:
        model: the stock model; ``generate`` and adapters are its own.
        softcap: logits x become c tanh(x / c).
        proven: whether that has been found out.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model with its weights.

        Raises:
            ConfigError: it lacks a linear head or a list of layers.
        """
        super().__init__()
        self.model = model
        name = type(model).__name__
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f"{name} has no linear output head; {OTHER}")
        if not any(_has_layers(m) for m in model.modules()):
            raise ConfigError(f"{name} has no list of decoder layers; {OTHER}")
        if type(head) is nn.Linear and "bias" not in dict(head.named_parameters()):
            head.__class__ = OutputHead
        embeddings: Any = model.get_input_embeddings()
        self.vocab_size, self.width = embeddings.weight.shape
        self.context = context_of(model.config)
        self.logit_scale = 1.0
        self.softcap: float | None = None
        self.proven = True
        self._stock = model.config._attn_implementation
        self.packs = self.caches = self._attend_with(PACKED)

    @property
    def base(self) -> nn.Module:
        """The model without its head."""
        return next(m for m in self.model.modules() if _has_layers(m))

    @property
    def head(self) -> nn.Linear:
        """(V, C), perhaps tied to the embeddings."""
        head: nn.Linear = self.model.get_output_embeddings()
        return head

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C); ids outside the vocabulary get the first token's embedding."""
        inside = (ids >= 0) & (ids < self.vocab_size)
        embeds: Tensor = self.model.get_input_embeddings()(ids.where(inside, 0))
        return embeds

    def hidden(
        self,
        embeds: Tensor,
        positions: Tensor,
        *,
        documents: Documents | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the head takes; see the contract.

        Raises:
            ConfigError: a prefix is given to a family that cannot take it.
        """
        if cache is not None:
            # Compiled layers would be compiled anew for each layer's state of the cache.
            with torch.compiler.set_stance("force_eager"):
                return self._forward(embeds, positions, mask, cache)
        if documents is None:
            return self._forward(embeds, positions, mask, None)
        if self.packs:
            # With a mask of its own the family does not look for documents in the positions.
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
            return self._forward(embeds, positions, mask, None, documents=documents)
        if documents.prefix:
            raise ConfigError(f"{type(self.model).__name__} takes no prefix of keys and values")
        rows = (x.split(documents.lengths, dim=1) for x in (embeds, positions))
        apart = [self._forward(e, p, None, None) for e, p in zip(*rows, strict=True)]
        return torch.cat(apart, dim=1)

    @torch.no_grad()  # with gradients, layers that are recomputed would not fill the cache
    def prefix(self, ids: Tensor) -> tuple[Tensor, tuple[KeysAndValues, ...]]:
        """(1, P) ids -> (1, P, C) hidden states, and each layer's keys and values."""
        cache = DynamicCache()  # without a configuration: no layer forgets what leaves its window
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden = self.hidden(self.embed(ids), positions, cache=cache)
        return hidden, tuple((layer.keys, layer.values) for layer in cache.layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) fp32."""
        logits: Tensor = self.head(hidden).float() * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        return logits

    @property
    def chunked(self) -> bool:
        """Whether the loss never holds all logits: the head has nothing but its weight."""
        return isinstance(self.head, OutputHead) and self.softcap is None

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of (N, C) hidden states for (N,) targets, summed, fp32."""
        if self.chunked:
            loss: Tensor = self.head(hidden * self.logit_scale, targets)
            # A tensor of its own: of the head's hooks and the model's on one tensor, FSDP2 would
            # run the head's first, and gather in another order than a process whose loss has more.
            return loss + 0.0
        return F.cross_entropy(self.logits(hidden), targets, reduction="sum")

    def blocks(self) -> Iterator[nn.Module]:
        """Decoder layers in order."""
        lists = (m for m in self.base.children() if isinstance(m, nn.ModuleList))
        yield from max(lists, key=len)

    def run_plainly(self, reason: str) -> None:
        """Compute documents one by one, with the family's own attention, and say why."""
        logger.info(
            "%s: documents are computed one by one, without a prefix's keys and values: %s",
            type(self.model).__name__, reason,
        )  # fmt: skip
        self.packs = self.caches = False
        self._attend_with(self._stock)

    def _attend_with(self, name: str) -> bool:
        """Choose the attention function; whether the family lets it be chosen."""
        self.model.set_attn_implementation(name)
        return bool(self.model.config._attn_implementation == name)

    def _forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        **more: Documents,
    ) -> Tensor:
        output = self.base(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            cache=cache,
            use_cache=cache is not None,
            **more,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden.to(self.head.weight.dtype)  # residuals are wider in some families


def _has_layers(module: nn.Module) -> bool:
    lists = (m for m in module.children() if isinstance(m, nn.ModuleList))
    return isinstance(module, PreTrainedModel) and any(lists)


def context_of(config: Any) -> int:
    """Tokens up to which a token's computation does not depend on the row's length."""
    context = int(getattr(config, "max_position_embeddings", None) or 2**31)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for kind in kinds:
        if kind.get("rope_type") in ("longrope", "dynamic"):  # other frequencies for longer rows
            original = kind.get("original_max_position_embeddings") or context
            if original < context:
                logger.info(
                    "context: %d tokens; past them %s would change what is cached and packed",
                    original, kind["rope_type"],
                )  # fmt: skip
            context = min(context, int(original))
    return context
