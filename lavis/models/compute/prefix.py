"""What every conversation begins with, computed once by a frozen language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lavis.common.types import IGNORE_INDEX, Batch
from lavis.models.compute.attention import KeysAndValues


@dataclass(frozen=True)
class ConstantPrefix:
    """What every document begins with, up to the user's first word.

    Attributes:
        ids: P token ids.
        keys_and_values: of each layer, (1, heads, P, head_dim).
        loss_sum: scalar, cross-entropy of its own supervised tokens, the same in every document.
        num_supervised: how many those are.
    """

    ids: tuple[int, ...]
    keys_and_values: tuple[KeysAndValues, ...]
    loss_sum: Tensor
    num_supervised: int

    @property
    def length(self) -> int:
        """P."""
        return len(self.ids)

    def opens(self, batch: Batch) -> bool:
        """Whether every document of a batch begins with it and goes on unsupervised."""
        own, n = torch.tensor(self.ids), self.length
        documents = (row[0].split(batch.lengths) for row in (batch.input_ids, batch.labels))
        return all(
            len(ids) > n and ids[:n].equal(own) and labels[n] == IGNORE_INDEX
            for ids, labels in zip(*documents, strict=True)
        )
