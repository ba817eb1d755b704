"""Which samples make up which step, and who computes them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from lavis.common import dist
from lavis.common.errors import ConfigError
from lavis.datasets.instruction import ConcatDataset
from lavis.datasets.plan import BatchPlan, shared_batches

SHAPES = [(1, 8), (2, 4), (4, 2), (8, 1)]


def step_of(plan: BatchPlan, epoch: int, step: int) -> list[int]:
    """Sample indices of a step of an epoch, in order."""
    start = step * plan.samples_per_step
    return plan.order(epoch)[start : start + plan.samples_per_step]


def cut(num_samples: int, batch_size: int, accumulation: int, seed: int = 3) -> BatchPlan:
    """The plan of one process."""
    return BatchPlan((num_samples,), batch_size * accumulation, batch_size, seed)


def flat(plan: BatchPlan, epoch: int, rank: int = 0) -> list[tuple[int, int]]:
    return [key for step in plan.micro_batches(epoch, rank) for micro in step for key in micro]


# --- one process ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 7, 8, 9, 21])
@pytest.mark.parametrize(("batch_size", "accumulation"), [*SHAPES, (3, 2), (1, 1)])
def test_every_sample_once_an_epoch(num_samples: int, batch_size: int, accumulation: int) -> None:
    plan = cut(num_samples, batch_size, accumulation)
    for epoch in (0, 1, 5):
        assert Counter(flat(plan, epoch)) == Counter((epoch, i) for i in range(num_samples))
        steps = plan.micro_batches(epoch)
        micro_batches = [m for step in steps for m in step]
        assert all(1 <= len(m) <= batch_size for m in micro_batches)
        assert all(len(m) == batch_size for m in micro_batches[:-1])
        assert all(len(step) == accumulation for step in steps[:-1])
        assert plan.steps_per_epoch == len(steps) == -(-len(micro_batches) // accumulation)


def test_steps_per_epoch_counts_the_short_last_one() -> None:
    assert [cut(n, 2, 4).steps_per_epoch for n in (1, 8, 9, 16, 17)] == [1, 1, 2, 2, 3]


def test_the_permutation_does_not_depend_on_how_a_step_is_cut() -> None:
    plans = [cut(21, b, a) for b, a in SHAPES]
    assert all(flat(plan, 2) == flat(plans[0], 2) for plan in plans)
    assert {plan.steps_per_epoch for plan in plans} == {3}
    steps = [
        [sorted(key for micro in step for key in micro) for step in plan.micro_batches(2)]
        for plan in plans
    ]
    assert all(step == steps[0] for step in steps)
    assert [len(step) for step in steps[0]] == [8, 8, 5]


def test_permutations_differ_by_epoch_and_seed_and_repeat() -> None:
    plan = cut(50, 1, 1)
    assert plan.order(0) == cut(50, 4, 2).order(0)
    orders = [plan.order(0), plan.order(1), cut(50, 1, 1, seed=4).order(0)]
    assert len({tuple(order) for order in orders}) == 3
    assert plan.order(0) != list(range(50))


def test_resuming_inside_an_epoch_leaves_out_the_first_steps() -> None:
    plan = cut(21, 2, 3)
    assert plan.micro_batches(1, first_step=2) == plan.micro_batches(1)[2:]
    assert len(plan.micro_batches(1, first_step=2)) == 2
    assert plan.micro_batches(1, first_step=plan.steps_per_epoch) == []


# --- several processes, and micro-batches by tokens -----------------------------------------


def drawn() -> list[BatchPlan]:
    """Plans of every sort, drawn once."""
    rng = random.Random(5)
    plans = []
    for number in range(60):
        count = rng.randint(1, 70)
        lengths = tuple(rng.choice([rng.randint(1, 9), rng.randint(1, 100)]) for _ in range(count))
        plan = BatchPlan(
            (count,),
            samples_per_step=rng.randint(1, 24),
            batch_size=rng.randint(1, 9),
            seed=rng.randint(0, 2**32 - 1),
            world_size=rng.randint(1, 5),
        )
        if number % 2:
            limit = max(lengths) + rng.randint(0, 100)
            plan = replace(plan, lengths=lengths, max_tokens=limit)
        plans.append(plan)
    return plans


@pytest.mark.parametrize("plan", drawn(), ids=itertools.count())
def test_all_ranks_together_see_every_sample_once_and_stay_in_step(plan: BatchPlan) -> None:
    ranks = [plan.micro_batches(4, rank) for rank in range(plan.world_size)]
    everything = [key for rank in range(plan.world_size) for key in flat(plan, 4, rank)]
    assert Counter(everything) == Counter((4, i) for i in range(plan.samples_per_epoch))
    assert all(len(steps) == plan.steps_per_epoch for steps in ranks)
    for step, of_ranks in enumerate(zip(*ranks, strict=True)):
        assert len({len(micro_batches) for micro_batches in of_ranks}) == 1
        indices = [i for micro_batches in of_ranks for m in micro_batches for _, i in m]
        assert sorted(indices) == sorted(step_of(plan, 4, step))


@pytest.mark.parametrize("plan", drawn()[1::2], ids=itertools.count())
def test_a_steps_samples_depend_on_neither_ranks_nor_micro_batches(plan: BatchPlan) -> None:
    size = plan.samples_per_step
    order = plan.order(1)
    wanted = [order[start : start + size] for start in range(0, len(order), size)]
    for other in (
        replace(plan, world_size=1),
        replace(plan, world_size=7),
        replace(plan, batch_size=3, max_tokens=None, lengths=None),
        replace(plan, max_tokens=500),
    ):
        assert [step_of(other, 1, s) for s in range(other.steps_per_epoch)] == wanted


@pytest.mark.parametrize("plan", drawn()[1::2], ids=itertools.count())
def test_no_micro_batch_has_more_than_max_tokens(plan: BatchPlan) -> None:
    assert plan.lengths is not None
    assert plan.max_tokens is not None
    lengths, limit = plan.lengths, plan.max_tokens
    for steps in (plan.micro_batches(0, rank) for rank in range(plan.world_size)):
        for micro_batches in steps:
            assert all(sum(lengths[i] for _, i in m) <= limit for m in micro_batches)


def test_few_and_equally_long_micro_batches() -> None:
    plan = BatchPlan((4,), 4, 1, seed=0, lengths=(6, 2, 6, 2), max_tokens=10)
    (step,) = plan.micro_batches(0)
    assert [sorted(plan.lengths[i] for _, i in m) for m in step] == [[2, 6], [2, 6]]  # type: ignore[index]
    lengths = tuple(random.Random(2).randint(10, 200) for _ in range(256))
    plan = BatchPlan((256,), 256, 1, seed=0, world_size=4, lengths=lengths, max_tokens=1000)
    work = [
        sum(lengths[i] for _, i in micro)
        for rank in range(4)
        for micro in plan.micro_batches(0, rank)[0]
    ]
    assert len(work) == -(-sum(lengths) // 1000 // 4) * 4  # as few as can be
    assert max(work) - min(work) < 20


def test_bins_that_even_shares_would_overfill() -> None:
    """Each sample to the shortest bin would give 9 + 5 and 8 + 5 + 5."""
    lengths = (9, 8, 5, 5, 5)
    plan = BatchPlan((5,), 5, 1, seed=0, lengths=lengths, max_tokens=17)
    (step,) = plan.micro_batches(0)
    assert sorted(sorted(lengths[i] for _, i in m) for m in step) == [[5, 5, 5], [8, 9]]


def test_a_sample_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        BatchPlan((3,), 2, 2, seed=0, lengths=(5, 9, 7), max_tokens=8)
    assert str(caught.value) == (
        "run.max_tokens_per_batch is 8, but a sample has 9 tokens; raise it, or lower "
        "model.max_txt_len"
    )
    BatchPlan((3,), 2, 2, seed=0, lengths=(5, 9, 7), max_tokens=9)


# --- shares of data sets --------------------------------------------------------------------


def shares(plan: BatchPlan, epoch: int = 0) -> list[int]:
    """Samples of each data set in an epoch."""
    ends = [sum(plan.sizes[: d + 1]) for d in range(len(plan.sizes))]
    of = Counter(next(d for d, end in enumerate(ends) if i < end) for i in plan.order(epoch))
    return [of[d] for d in range(len(plan.sizes))]


@pytest.mark.parametrize(
    ("sizes", "ratios", "wanted"),
    [
        ((10, 6, 5), (1, 2, 1), [5, 11, 5]),  # 5.25, 10.5, 5.25
        ((10, 6, 4), (1, 1, 1), [7, 7, 6]),
        ((3, 97), (0.5, 0.5), [50, 50]),
        ((8, 4), (3, 0), [12, 0]),
        ((8, 4), (0, 0.1), [0, 12]),
        ((1, 1), (1, 1000), [0, 2]),
    ],
)
def test_shares_by_largest_remainder(
    sizes: tuple[int, ...], ratios: tuple[float, ...], wanted: list[int]
) -> None:
    plan = BatchPlan(sizes, 4, 2, seed=3, ratios=ratios)
    assert [shares(plan, epoch) for epoch in range(3)] == [wanted] * 3
    assert plan.steps_per_epoch == len(plan.micro_batches(0)) == -(-sum(sizes) // 4)


def test_over_epochs_each_sample_of_a_data_set_comes_up_equally_often() -> None:
    plan = BatchPlan((10, 6, 5), 4, 2, seed=3, ratios=(1, 3, 2))
    seen: Counter[int] = Counter()
    for epoch in range(9):
        seen.update(plan.order(epoch))
        for start, size in ((0, 10), (10, 6), (16, 5)):
            counts = [seen[i] for i in range(start, start + size)]
            assert max(counts) - min(counts) <= 1
    assert seen.total() == 9 * 21


def test_data_sets_are_interleaved_and_differ_by_epoch() -> None:
    plan = BatchPlan((50, 50), 10, 5, seed=3, ratios=(1, 1))
    sources = [i < 50 for i in plan.order(0)]
    assert 30 < sum(one != other for one, other in pairwise(sources)) < 70
    assert all(2 <= sum(i < 50 for i in step_of(plan, 0, s)) <= 8 for s in range(10))
    assert plan.order(0) != plan.order(1)
    assert plan.order(1) == replace(plan, world_size=3, batch_size=1).order(1)


# --- evaluation -----------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 1, 5, 8, 23])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_share_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, samples: int, world: int
) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: world)
    everyone = []
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        everyone.append(shared_batches(samples, 3))
    assert len({len(batches) for batches in everyone}) == 1
    keys = [key for batches in everyone for batch in batches for key in batch]
    assert sorted(keys) == [(0, i) for i in range(samples)]
    assert all(len(batch) <= 3 for batches in everyone for batch in batches)


# --- what a loader asks ---------------------------------------------------------------------


def test_data_sets_end_to_end() -> None:
    class Named:
        def __init__(self, name: str, size: int) -> None:
            self.name, self.size = name, size
            self.lengths = tuple(range(size))

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, key: tuple[int, int]) -> tuple[str, int, int]:
            return self.name, *key

    both = ConcatDataset([Named("a", 2), Named("b", 0), Named("c", 3)])  # type: ignore[list-item]
    assert len(both) == 5
    assert both.sizes == (2, 0, 3)
    assert both.lengths == (0, 1, 0, 1, 2)
    assert [both[7, i] for i in range(5)] == [
        ("a", 7, 0),
        ("a", 7, 1),
        ("c", 7, 0),
        ("c", 7, 1),
        ("c", 7, 2),
    ]
    with pytest.raises(IndexError):
        both[7, 5]
