"""Keys and values of rows that are decoded together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lavis.common.device import to_device
from lavis.models.compute.attention import attend_all
from lavis.models.compute.masks import Asked, Documents, KeysAndValues

_BLOCK = 64  # tokens by which a buffer grows


class Slots:
    """Rows of different lengths in buffers of (S, heads, K, head_dim) a layer.

    A row's first token lies in its first place, so that rows join and leave without moving the
    others; what lies after its last one is zeros, or what an earlier row left, and is never seen.

    Attributes:
        lengths: tokens held, by row.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def join(self, lengths: Sequence[int], prefix: tuple[KeysAndValues, ...] = ()) -> Documents:
        """The packed row of new rows' tokens, which are held after the pass.

        Args:
            lengths: of the new rows, without the prefix.
            prefix: what they all begin with; see :class:`Documents`.
        """
        documents = Documents(tuple(lengths), prefix)
        first, before = len(self.lengths), documents.prefix_length
        self.lengths += [before + n for n in lengths]
        return Documents(documents.lengths, prefix, keep=partial(self._store, first, documents))

    def step(self, device: torch.device) -> tuple[Documents, Tensor]:
        """The packed row of one more token of every row, and (1, S) positions of these."""
        positions = to_device(torch.tensor(self.lengths), device)
        self.lengths = [n + 1 for n in self.lengths]
        rows = torch.arange(len(positions), device=device)
        places = torch.arange(max(self.lengths), device=device)
        seen = (places <= positions[:, None])[:, None, None]  # where the family has no rule
        keep = partial(self._append, positions, rows, seen)
        return Documents((1,) * len(self.lengths), keep=keep), positions[None]

    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = self.lengths.pop()
        if row < len(self.lengths):
            self.lengths[row] = last
            for buffer in self._buffers.values():
                buffer[row, :, :last] = buffer[len(self.lengths), :, :last]

    def _store(self, first: int, documents: Documents, asked: Asked) -> None:
        layer, before = asked.layer, documents.prefix_length
        for part, new in enumerate((asked.key, asked.value)):
            buffer = self._buffer(layer, part, new)
            for row, own in enumerate(new[0].split(documents.lengths, dim=1), start=first):
                if before:
                    buffer[row, :, :before] = documents.prefix[layer][part][0]
                buffer[row, :, before : self.lengths[row]] = own

    def _append(self, positions: Tensor, rows: Tensor, seen: Tensor, asked: Asked) -> Tensor:
        longest = seen.shape[-1]
        held: list[Tensor] = []
        for part, new in enumerate((asked.key, asked.value)):
            buffer = self._buffer(asked.layer, part, new)
            buffer[rows, :, positions] = new[0].transpose(0, 1)
            held.append(buffer[: len(rows), :, :longest])
        mask = seen if asked.rule is None else asked.rule.seen(positions, longest)
        query, (keys, values) = asked.query.transpose(0, 2), held
        out = attend_all(asked.module, query, keys, values, mask, asked.softmax, longest)
        return out.transpose(0, 1)

    def _buffer(self, layer: int, part: int, new: Tensor) -> Tensor:
        """A layer's keys (part 0) or values (1), with room for all rows."""
        buffer = self._buffers.get((layer, part))
        rows, tokens = len(self.lengths), max(self.lengths)
        if buffer is not None and buffer.shape[0] >= rows and buffer.shape[2] >= tokens:
            return buffer
        _, heads, _, width = new.shape
        old = new.new_empty(0, heads, 0, width) if buffer is None else buffer
        rows, tokens = max(rows, old.shape[0]), max(-(-tokens // _BLOCK) * _BLOCK, old.shape[2])
        grown = new.new_zeros(rows, heads, tokens, width)
        grown[: old.shape[0], :, : old.shape[2]] = old
        self._buffers[layer, part] = grown
        return grown
