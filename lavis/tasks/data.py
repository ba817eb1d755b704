"""The data of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lavis.datasets.instruction import InstructionDataset
from lavis.datasets.plan import ConcatDataset

Splits = Mapping[str, Sequence[InstructionDataset]]
"""Splits by name: the part that each block of ``datasets`` has in it."""


class RunData(ConcatDataset):
    """The training samples end to end, asked by ``(epoch, index)``; the evaluated splits beside.

    Attributes:
        datasets: one for each block of ``datasets``, whose share ``train_dataset_ratios`` may give.
        trained: splits to train on, which ``datasets`` are made of.
        evaluated: splits to validate on or to answer.
    """

    def __init__(self, trained: Splits, evaluated: Splits) -> None:
        blocks = zip(*trained.values(), strict=True)
        super().__init__([p[0] if len(p) == 1 else ConcatDataset(p) for p in blocks])
        self.trained, self.evaluated = trained, evaluated
