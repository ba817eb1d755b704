"""Which samples make up which optimizer step: a pure function of its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from lavis.common import dist
from lavis.common.errors import ConfigError

Key = tuple[int, int]
"""(epoch, sample index), what a data set is asked for."""

MicroBatches = list[list[Key]]


@dataclass(frozen=True)
class BatchPlan:
    """Optimizer steps of a run.

    Three decisions, each independent of those after it, so that the loss of a step depends on the
    first alone:

    1. *Order*: an epoch is one random permutation of its samples. Without ``ratios`` that is every
       sample once. With them, as many samples are drawn as there are, each data set contributing
       its share; a data set's own permutations follow each other through the epochs, so that each
       of its samples comes up equally often.
    2. *Steps*: the order is cut into pieces of ``samples_per_step``; the last piece of an epoch
       may be smaller, and nothing leaks over the epoch's end.
    3. *Work*: a step's samples are cut into micro-batches and given to ranks. Every rank gets
       equally many, of which some may be empty, because sharded models need the ranks to call each
       layer equally often.

    Attributes:
        sizes: samples of each data set; sample indices count through all of them.
        samples_per_step: samples of an optimizer step, over all ranks.
        batch_size: samples of a micro-batch, where ``max_tokens`` is not given.
        seed: of the permutations.
        world_size: ranks.
        ratios: share of each data set, in any unit, or ``None``.
        lengths: tokens of each sample; needed with ``max_tokens``.
        max_tokens: tokens of a micro-batch at most. Its samples are chosen so that micro-batches
            are few and equally long.
    """

    sizes: tuple[int, ...]
    samples_per_step: int
    batch_size: int
    seed: int
    world_size: int = 1
    ratios: tuple[float, ...] | None = None
    lengths: tuple[int, ...] | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is None:
            return
        assert self.lengths is not None
        longest = max(self.lengths)
        if longest > self.max_tokens:
            raise ConfigError(
                f"run.max_tokens_per_batch is {self.max_tokens}, but a sample has {longest} "
                "tokens; raise it, or lower model.max_txt_len"
            )

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch shows."""
        return sum(self.sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.samples_per_epoch // self.samples_per_step)

    def order(self, epoch: int) -> list[int]:
        """Sample indices of an epoch, in order."""
        if self.ratios is None:
            return _permutation(self.samples_per_epoch, self.seed, epoch)
        starts = [0, *accumulate(self.sizes)]
        drawn = [
            start + index
            for d, (start, share) in enumerate(zip(starts, self._shares(), strict=False))
            for index in self._draw(d, epoch * share, share)
        ]
        return [drawn[i] for i in _permutation(len(drawn), self.seed, epoch)]

    def micro_batches(self, epoch: int, rank: int = 0, first_step: int = 0) -> list[MicroBatches]:
        """What a rank computes in an epoch: its micro-batches of each step, from a step on."""
        order, size = self.order(epoch), self.samples_per_step
        return [
            [[(epoch, i) for i in micro] for micro in self._cut(order[start : start + size])[rank]]
            for start in range(first_step * size, len(order), size)
        ]

    def _shares(self) -> list[int]:
        """Samples of each data set in an epoch, by largest remainder."""
        assert self.ratios is not None
        exact = [r / sum(self.ratios) * self.samples_per_epoch for r in self.ratios]
        shares = [int(x) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda d: shares[d] - exact[d])
        for d in by_remainder[: self.samples_per_epoch - sum(shares)]:
            shares[d] += 1
        return shares

    def _draw(self, dataset: int, start: int, count: int) -> Iterator[int]:
        """Items ``start`` to ``start + count`` of a data set's endless run of permutations."""
        size = self.sizes[dataset]
        while count > 0:
            turn, offset = divmod(start, size)
            order = _permutation(size, self.seed, turn, stream=dataset + 1)
            yield from order[offset : offset + count]
            start, count = start + size - offset, count - (size - offset)

    def _cut(self, samples: Sequence[int]) -> list[list[list[int]]]:
        """A step's samples by rank and micro-batch; equally many micro-batches on each rank."""
        if self.max_tokens is None:
            bins = [
                list(samples[i : i + self.batch_size])
                for i in range(0, len(samples), self.batch_size)
            ]
        else:
            bins = self._pack(samples)
        bins += [[] for _ in range(-len(bins) % self.world_size)]
        return [bins[rank :: self.world_size] for rank in range(self.world_size)]

    def _pack(self, samples: Sequence[int]) -> list[list[int]]:
        """Few bins of at most ``max_tokens``, a multiple of ``world_size``, equally long.

        The number of bins is what first-fit decreasing needs; then every sample, longest first,
        goes to the shortest bin. Where that overfills one, first-fit decreasing stands.
        """
        assert self.lengths is not None and self.max_tokens is not None
        lengths, limit = self.lengths, self.max_tokens
        longest_first = sorted(range(len(samples)), key=lambda i: (-lengths[samples[i]], i))
        first_fit: list[list[int]] = []
        used: list[int] = []
        for i in longest_first:
            length = lengths[samples[i]]
            b = next((b for b, u in enumerate(used) if u + length <= limit), len(used))
            if b == len(used):
                first_fit.append([])
                used.append(0)
            first_fit[b].append(i)
            used[b] += length
        count = len(first_fit) + -len(first_fit) % self.world_size
        even: list[list[int]] = [[] for _ in range(count)]
        used = [0] * count
        for i in longest_first:
            b = min(range(count), key=used.__getitem__)
            even[b].append(i)
            used[b] += lengths[samples[i]]
        chosen = even if max(used) <= limit else first_fit
        return [[samples[i] for i in sorted(b)] for b in chosen]


def _permutation(size: int, seed: int, number: int, stream: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed((stream << 52) + (seed << 20) + number)
    return torch.randperm(size, generator=generator).tolist()


def shared_batches(samples: int, batch_size: int) -> list[list[Key]]:
    """This process's batches of an evaluation: every sample in one process's, once.

    Every process gets equally many batches; some may be empty.
    """
    batches = [
        [(0, i) for i in range(start, min(start + batch_size, samples))]
        for start in range(0, samples, batch_size)
    ]
    batches += [[] for _ in range(-len(batches) % dist.world_size())]
    return batches[dist.rank() :: dist.world_size()]
