"""Keys and values of a conversation, in buffers that grow and roll back without copying."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

_BLOCK = 256  # tokens by which a buffer grows


def room(tokens: int) -> int:
    """Tokens for which a buffer that holds so many has room."""
    return -(-tokens // _BLOCK) * _BLOCK


def _lies_along(keys: Tensor) -> bool:
    """Whether the numbers of a key's dimension lie next to each other, rather than a key's.

    So they are read by products of matrices in half precision on a CPU
    (:func:`lavis.models.compute.attention.packed_attention`), which take a third less time
    then; other kernels would have to copy them.
    """
    return keys.device.type == "cpu" and keys.dtype in (torch.float16, torch.bfloat16)


class _Layer(DynamicLayer):
    """Unlike its base, it does not copy everything at every token."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (1, heads, N, head_dim) keys and values.

        Returns:
            The buffers: all keys and values, and room, whose beginning the mask knows.
        """
        end = self.length + key_states.shape[2]
        self.keys = self._append(self.keys, key_states, end, along=_lies_along(key_states))
        self.values = self._append(self.values, value_states, end)
        self.is_initialized = True
        self.length = end
        return self.keys, self.values

    def _append(
        self, buffer: Tensor | None, new: Tensor, end: int, *, along: bool = False
    ) -> Tensor:
        if buffer is None or end > buffer.shape[2]:
            capacity = room(end)
            batch, heads, _, width = new.shape
            if along:
                grown = new.new_zeros(batch, heads, width, capacity).transpose(2, 3)
            else:
                grown = new.new_zeros(batch, heads, capacity, width)
            if buffer is not None:
                grown[:, :, : self.length] = buffer[:, :, : self.length]
            buffer = grown
        buffer[:, :, self.length : end] = new
        return buffer

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def truncate(self, length: int) -> None:
        """Forget what comes after the first ``length`` tokens."""
        self.length = min(self.length, length)


class ConversationCache(Cache):
    """A conversation's keys and values, and what they are of.

    Attributes:
        content: for each token held, its id, or a number under 0 that is an image's own.
        graph: what computes the next token over these buffers, if it was recorded.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)
        self.content: list[int] = []
        self.graph: object = None

    def common(self, content: list[int]) -> int:
        """How many tokens at the beginning are the same."""
        if self.content == content[: len(self.content)]:  # as at every token of an answer
            return len(self.content)
        pairs = enumerate(zip(self.content, content, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.content), len(content)))

    def truncate(self, length: int) -> None:
        """Forget what comes after the first ``length`` tokens, also what a broken call left."""
        del self.content[length:]
        for layer in self.layers:
            layer.truncate(length)

    def clear(self) -> None:
        """Forget everything, and give the buffers back."""
        self.content.clear()
        self.layers.clear()
        self.graph = None

    def beginning(self, length: int) -> ConversationCache:
        """A copy of the first ``length`` tokens, at most of those held."""
        copy = ConversationCache()
        copy.content = self.content[:length]
        for i, layer in enumerate(self.layers):
            copy.update(
                layer.keys[:, :, : len(copy.content)], layer.values[:, :, : len(copy.content)], i
            )
        return copy

    def repeated(self, times: int) -> DynamicCache:
        """A copy with ``times`` equal rows, for beam search."""
        copy = DynamicCache()
        for i, layer in enumerate(self.layers):
            parts = (x[:, :, : layer.length] for x in (layer.keys, layer.values))
            keys, values = (x.repeat_interleave(times, dim=0) for x in parts)
            copy.update(keys, values, i)
        return copy

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        buffers = (x for layer in list(self.layers) for x in (layer.keys, layer.values))
        return sum(x.nbytes for x in buffers if x is not None)

    @property
    def token_bytes(self) -> float:
        """Memory of a token's keys and values; 0 without any."""
        return self.nbytes / self.layers[0].keys.shape[2] if self.layers else 0.0
