"""What the parts of a model promise each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn
from transformers import Cache

from lavis.models.compute.masks import Documents, KeysAndValues


class LanguageModel(Protocol):
    """A causal language model that reads embeddings.

    Attributes:
        width: C, of an embedding.
        context: longest sequence, in tokens, that it computes as it was trained to.
        vocab_size: V, rows of the embeddings.
        logit_scale: factor of the head's output.
        packs: whether documents of a row attend apart in one pass, also after a prefix. Otherwise
            :meth:`hidden` computes them one by one, and takes no prefix.
        caches: whether a cache with room in its buffers may be given, and rolled back.
    """

    width: int
    context: int
    vocab_size: int
    logit_scale: float
    packs: bool
    caches: bool

    @property
    def head(self) -> nn.Linear:
        """(V, C) output head; its weight may be the embeddings' own."""

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C); anything for ids outside the vocabulary: image positions."""

    def hidden(
        self,
        embeds: Tensor,
        positions: Tensor,
        *,
        documents: Documents | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the head takes.

        Args:
            embeds: (B, T, C).
            positions: (B, T), of each token in its document.
            documents: of the single row.
            cache: what stands before; extended by the row.
            mask: (B, T) bool, false at padding.

        Returns:
            (B, T, C).
        """

    def prefix(self, ids: Tensor) -> tuple[Tensor, tuple[KeysAndValues, ...]]:
        """(1, P) ids -> (1, P, C) hidden states, and what :class:`Documents` takes as prefix."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) fp32."""

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, fp32, summed over the rows of (N, C), for (N,) targets."""

    def blocks(self) -> Iterable[nn.Module]:
        """Decoder layers in order, for sharding, recomputation and compilation."""
