"""Conversations whose next tokens are computed in one pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lavis.chat.cache import ConversationCache
from lavis.common.device import to_device
from lavis.models.compute.attention import attend_all
from lavis.models.compute.masks import Asked, Documents
from lavis.models.contracts import LanguageModel

_PATIENCE = 0.005  # seconds that a pass waits for conversations which were in the one before


@dataclass(eq=False)
class Request:
    """What a conversation wants computed.

    Attributes:
        cache: rolled back to what it has in common with ``content``, then extended to all of it.
        content: token ids; of an image's span, its number below 0.
        embeds: (Q, C) soft tokens of an image, by its number below 0.
        logits: (V,) fp32 of the token that follows, when computed.
        error: why they could not be.
    """

    cache: ConversationCache
    content: list[int]
    embeds: dict[int, Tensor]
    logits: Tensor | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is left to compute."""
        return self.logits is not None or self.error is not None

    @property
    def single(self) -> bool:
        """Whether all but one token of text is there, as between two tokens of an answer."""
        there = self.cache.common(self.content)
        return there >= len(self.content) - 1 > 0 and self.content[-1] >= 0

    def result(self) -> Tensor:
        """The logits; raises what went wrong."""
        if self.error is not None:
            raise self.error
        assert self.logits is not None
        return self.logits


class Waiting:
    """Requests of several threads, of which one computes what all of them wait for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._requests: list[Request] = []
        self._latest = 1  # requests taken at once
        self._led = False

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        """Have a request computed by whoever calls :meth:`take` next."""
        with self._changed:
            self._requests.append(request)
            self._changed.notify_all()

    def lead(self, request: Request) -> bool:
        """Wait until a request is done, or it is this thread's turn to compute for all.

        Returns:
            Whether it is; then it owes a call of :meth:`give_back`.
        """
        with self._changed:
            while self._led and not request.done:
                self._changed.wait()
            if not request.done:
                self._led = True
            return not request.done

    def take(self) -> list[Request]:
        """All requests, as soon as there are as many as the last time, or shortly."""
        end = time.monotonic() + _PATIENCE
        with self._changed:
            while len(self._requests) < self._latest and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            taken, self._requests = self._requests, []
            self._latest = len(taken)
            return taken

    def give_back(self, requests: Sequence[Request]) -> None:
        """Let another thread lead, and compute what is not done of these."""
        with self._changed:
            self._requests[:0] = [r for r in requests if not r.done]
            self._led = False
            self._changed.notify_all()

    def drop(self, request: Request) -> None:
        """Its thread goes on without it."""
        with self._changed:
            self._requests = [r for r in self._requests if r is not request]


def next_tokens(
    language: LanguageModel,
    caches: Sequence[ConversationCache],
    tokens: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Compute one more token of each conversation.

    The products with weights, nearly all of the work, are of all rows at once; every row attends to
    its own keys and values, where they lie. So a row differs from what it is alone by no more than
    the rounding of products of another size.

    Args:
        caches: R, extended by the token.
        tokens: R ids.

    Returns:
        (R, V) fp32 logits of the tokens that follow.
    """
    positions = to_device(torch.tensor([[len(cache.content) for cache in caches]]), device)
    documents = Documents((1,) * len(caches), keep=partial(_attend, caches, positions[0]))
    embeds = language.embed(to_device(torch.tensor([list(tokens)]), device))
    hidden = language.hidden(embeds, positions, documents=documents)
    for cache, token in zip(caches, tokens, strict=True):
        cache.content.append(token)
    return language.logits(hidden[0])


def _attend(caches: Sequence[ConversationCache], positions: Tensor, asked: Asked) -> Tensor:
    """(1, heads, R, head_dim) -> (1, R, heads, head_dim): each row with the keys of its cache."""
    module, rule, softmax, layer = asked.module, asked.rule, asked.softmax, asked.layer
    rows = []
    for row, cache in enumerate(caches):
        query, *new = (x[:, :, row : row + 1] for x in (asked.query, asked.key, asked.value))
        keys, values = cache.update(*new, layer)
        length = cache.layers[layer].get_seq_length()
        place = positions[row : row + 1]
        mask = None if rule is None or rule.causal else rule.seen(place, length)
        rows.append(attend_all(module, query, keys, values, mask, softmax, length))
    return torch.cat(rows, dim=1)
