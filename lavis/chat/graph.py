"""A token's pass as a CUDA graph: recorded once for a conversation's buffers, then replayed.

A pass of one token is some thousand small kernels, and Python takes about as long to launch them as
a small or a packed model takes to compute them. A graph launches all at once. Whatever the host
says while it is recorded stays as it was then, so the token, its position, and what it sees are
numbers of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lavis.chat.cache import ConversationCache
from lavis.common.device import to_device
from lavis.common.errors import ConfigError
from lavis.models.compute.attention import attend_all
from lavis.models.compute.masks import Asked, Documents
from lavis.models.contracts import LanguageModel

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Runs a pass, and returns what repeats it and where its result lies each time."""


def record_cuda(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a pass that waits for nothing and whose every input lies on the device.

    Raises:
        ConfigError: it waits, as where a family looks which of its experts are asked.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # libraries allocate at their first call, which cannot be recorded
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = run()
    except RuntimeError as error:
        raise ConfigError(
            f"--cuda-graphs: this language model's pass cannot be recorded ({error}); leave it out"
        ) from error
    return graph.replay, result


class TokenGraph:
    """The next token of one conversation, as long as its buffers have room."""

    def __init__(
        self,
        language: LanguageModel,
        cache: ConversationCache,
        record: Record,
        device: torch.device,
    ) -> None:
        """Record the pass of the token that follows the cache's; it computes nothing yet."""
        self._buffers = [(layer.keys, layer.values) for layer in cache.layers]
        self._token, self._place = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self._place.fill_(len(cache.content))
        self._replay, self._logits = record(partial(self._run, language))

    @staticmethod
    def of(
        language: LanguageModel, cache: ConversationCache, record: Record, device: torch.device
    ) -> TokenGraph | None:
        """The cache's own graph, recorded if need be; ``None`` where the buffers have no room."""
        if not cache.layers or len(cache.content) >= cache.layers[0].keys.shape[2]:
            return None
        held = cache.graph
        if not isinstance(held, TokenGraph) or not held._is_of(cache):
            held = cache.graph = TokenGraph(language, cache, record, device)
        return held

    def __call__(self, cache: ConversationCache, token: int) -> Tensor:
        """Extend the cache by a token: (V,) fp32 logits, which the next call overwrites."""
        given = to_device(torch.tensor([[token], [len(cache.content)]]), self._token.device)
        self._token.copy_(given[0])
        self._place.copy_(given[1])
        self._replay()
        cache.content.append(token)
        for layer in cache.layers:
            layer.length = len(cache.content)
        return self._logits[0]

    def _is_of(self, cache: ConversationCache) -> bool:
        layers = zip(self._buffers, cache.layers, strict=True)
        return len(self._buffers) == len(cache.layers) and all(
            keys is layer.keys and values is layer.values for (keys, values), layer in layers
        )

    def _run(self, language: LanguageModel) -> Tensor:
        documents = Documents((1,), keep=self._attend)
        embeds = language.embed(self._token[None])
        return language.logits(language.hidden(embeds, self._place[None], documents=documents)[0])

    def _attend(self, asked: Asked) -> Tensor:
        """Over all places of the buffers, of which the mask knows those that are filled."""
        keys, values = self._buffers[asked.layer]
        keys.index_copy_(2, self._place, asked.key)
        values.index_copy_(2, self._place, asked.value)
        capacity = keys.shape[2]
        if asked.rule is None:
            raise ConfigError("--cuda-graphs: this family does not say what a token sees")
        mask = asked.rule.seen(self._place, capacity)
        return attend_all(asked.module, asked.query, keys, values, mask, asked.softmax, capacity)
