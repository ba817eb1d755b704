"""The data of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lavis.common.workers import leave_signals_to_parent
from lavis.datasets.collate import collate
from lavis.datasets.instruction import ConcatDataset, InstructionDataset
from lavis.datasets.plan import Key

Splits = Mapping[str, Sequence[InstructionDataset]]
"""Splits by name: the part that each block of ``datasets`` has in it."""


class RunData(ConcatDataset):
    """The training samples end to end, asked by ``(epoch, index)``; the evaluated splits beside.

    Attributes:
        datasets: one for each block of ``datasets``, whose share ``train_dataset_ratios`` may give.
        trained: what ``datasets`` are made of: for each split, the part that each block has in it.
        evaluated: splits to validate on or to answer.
    """

    def __init__(self, trained: Sequence[Sequence[InstructionDataset]], evaluated: Splits) -> None:
        blocks = zip(*trained, strict=True)
        super().__init__([p[0] if len(p) == 1 else ConcatDataset(p) for p in blocks])
        self.trained, self.evaluated = trained, evaluated


def load_batches(
    dataset: Dataset[Any],
    keys: Iterable[Sequence[Key]],
    workers: int,
    *,
    ahead: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A packed :class:`Batch` for the keys of each micro-batch.

    Args:
        workers: processes that read ahead.
        ahead: micro-batches that they read at least while others are computed: a step's.
        pin_memory: for a GPU to copy from.
    """
    return DataLoader(
        dataset,
        batch_sampler=keys,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=max(2, -(-ahead // workers)) if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_parent,
    )
