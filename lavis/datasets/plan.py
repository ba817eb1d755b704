"""Which samples make up which optimizer step: a pure function of its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

Key = tuple[int, int]
"""(epoch, sample index), what a data set is asked for."""


@dataclass(frozen=True)
class BatchPlan:
    """Optimizer steps of a run.

    An epoch is one random permutation of all samples, cut into steps of
    ``batch_size * accumulation`` samples; the last step of an epoch may be smaller, so that every
    sample is seen once and nothing leaks over the epoch's end. The permutation does not depend on
    how a step is cut into micro-batches.

    Attributes:
        num_samples: size of the training set.
        batch_size: samples per micro-batch.
        accumulation: micro-batches per optimizer step.
        seed: of the permutations.
    """

    num_samples: int
    batch_size: int
    accumulation: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.num_samples // (self.batch_size * self.accumulation))

    def order(self, epoch: int) -> list[int]:
        """The permutation of an epoch."""
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def micro_batches(self, epoch: int, first_step: int = 0) -> list[list[Key]]:
        """Micro-batches of an epoch from a step on, in order."""
        order = self.order(epoch)[first_step * self.batch_size * self.accumulation :]
        return [
            [(epoch, index) for index in order[i : i + self.batch_size]]
            for i in range(0, len(order), self.batch_size)
        ]


class PlanSampler:
    """Feeds a data loader the micro-batches of one epoch."""

    def __init__(self, batches: Sequence[list[Key]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class ConcatDataset(torch.utils.data.Dataset):
    """Several data sets end to end, asked by ``(epoch, index)``."""

    def __init__(self, datasets: Sequence[torch.utils.data.Dataset]) -> None:
        self.datasets = list(datasets)
        self._sizes = [len(d) for d in self.datasets]  # type: ignore[arg-type]

    def __len__(self) -> int:
        return sum(self._sizes)

    def __getitem__(self, key: Key) -> object:
        epoch, index = key
        for dataset, size in zip(self.datasets, self._sizes, strict=True):
            if index < size:
                return dataset[epoch, index]
            index -= size
        raise IndexError(key)
