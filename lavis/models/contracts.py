"""What the parts of a model promise each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache

from lavis.models.compute.masks import Documents, KeysAndValues


class VisionEncoder(Protocol):
    """A module that encodes images.

    It is made with its configuration, the cache root, the device where it computes, and ``home``:
    where its weights are until then if a strategy is going to shard them, else ``None``. On the
    device ``meta`` it has sizes alone, and looks for no weights.
    """

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) as the image processor makes them -> (N, Q, D) features.

        Raises:
            DataError: images of another shape.
        """

    @staticmethod
    def shape(config: Any, cache_root: str) -> tuple[int, int]:
        """(Q, D), the shape of an image's features; reads no weight."""

    @staticmethod
    def fingerprint(config: Any, cache_root: str, device: torch.device) -> str:
        """A hash of weights, settings and precision: features of one are those of the other.

        Loads nothing. ``run.feature_cache`` alone asks for it.
        """

    def learning(self, parts: Sequence[str]) -> Iterable[nn.Module | nn.Parameter]:
        """What learns if these of the configuration's ``PARTS`` do; without any, all of it."""

    def blocks(self) -> Iterable[nn.Module]:
        """Parts of like size that are used one after the other, for sharding."""

    def flops(self, cost: Callable[[nn.Module], float]) -> float:
        """Floating-point operations of an image, given those of a module's use on one token."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As a module has them."""

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module:
        """As a module has it."""


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
