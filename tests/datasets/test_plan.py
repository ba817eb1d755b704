"""Which samples make up which step."""

from __future__ import annotations

from collections import Counter

import pytest

from lavis.datasets.plan import BatchPlan, ConcatDataset, PlanSampler

SHAPES = [(1, 8), (2, 4), (4, 2), (8, 1)]


@pytest.mark.parametrize("num_samples", [1, 7, 8, 9, 21])
@pytest.mark.parametrize(("batch_size", "accumulation"), [*SHAPES, (3, 2), (1, 1)])
def test_every_sample_once_an_epoch(num_samples: int, batch_size: int, accumulation: int) -> None:
    plan = BatchPlan(num_samples, batch_size, accumulation, seed=3)
    for epoch in (0, 1, 5):
        micro_batches = plan.micro_batches(epoch)
        keys = [key for micro_batch in micro_batches for key in micro_batch]
        assert Counter(keys) == Counter((epoch, i) for i in range(num_samples))
        assert all(1 <= len(m) <= batch_size for m in micro_batches)
        assert all(len(m) == batch_size for m in micro_batches[:-1])
        assert plan.steps_per_epoch == -(-len(micro_batches) // accumulation)


def test_steps_per_epoch_counts_the_short_last_one() -> None:
    assert [BatchPlan(n, 2, 4, 0).steps_per_epoch for n in (1, 8, 9, 16, 17)] == [1, 1, 2, 2, 3]


def test_the_permutation_does_not_depend_on_how_a_step_is_cut() -> None:
    plans = [BatchPlan(21, b, a, seed=3) for b, a in SHAPES]
    flat = [[key for m in plan.micro_batches(2) for key in m] for plan in plans]
    assert all(keys == flat[0] for keys in flat)
    assert {plan.steps_per_epoch for plan in plans} == {3}
    steps = [
        [
            sorted(key for m in plan.micro_batches(2)[s * a : (s + 1) * a] for key in m)
            for s in range(plan.steps_per_epoch)
        ]
        for plan, (_, a) in zip(plans, SHAPES, strict=True)
    ]
    assert all(step == steps[0] for step in steps)
    assert [len(step) for step in steps[0]] == [8, 8, 5]


def test_permutations_differ_by_epoch_and_seed_and_repeat() -> None:
    plan = BatchPlan(50, 1, 1, seed=3)
    assert plan.order(0) == BatchPlan(50, 4, 2, seed=3).order(0)
    orders = [plan.order(0), plan.order(1), BatchPlan(50, 1, 1, seed=4).order(0)]
    assert len({tuple(order) for order in orders}) == 3
    assert plan.order(0) != list(range(50))


def test_resuming_inside_an_epoch_leaves_out_the_first_steps() -> None:
    plan = BatchPlan(21, 2, 3, seed=3)
    assert plan.micro_batches(1, first_step=2) == plan.micro_batches(1)[6:]
    assert plan.micro_batches(1, first_step=plan.steps_per_epoch) == []


def test_sampler_hands_out_the_micro_batches() -> None:
    batches = [[(0, 3)], [(0, 1), (0, 2)]]
    assert list(PlanSampler(batches)) == batches
    assert len(PlanSampler(batches)) == 2


def test_data_sets_end_to_end() -> None:
    class Named:
        def __init__(self, name: str, size: int) -> None:
            self.name, self.size = name, size

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, key: tuple[int, int]) -> tuple[str, int, int]:
            return self.name, *key

    both = ConcatDataset([Named("a", 2), Named("b", 0), Named("c", 3)])  # type: ignore[list-item]
    assert len(both) == 5
    assert [both[7, i] for i in range(5)] == [
        ("a", 7, 0),
        ("a", 7, 1),
        ("c", 7, 0),
        ("c", 7, 1),
        ("c", 7, 2),
    ]
    with pytest.raises(IndexError):
        both[7, 5]
