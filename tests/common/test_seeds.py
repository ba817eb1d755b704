"""Seeds of random draws."""

from __future__ import annotations

import torch

from lavis.common.seeds import derived_seed, drawing_from


def test_seeds_differ() -> None:
    seeds = {derived_seed(s, e, i) for s in range(5) for e in range(5) for i in range(20)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1, 23, 4) != derived_seed(12, 3, 4)


def test_draws_depend_on_what_they_are_for_alone() -> None:
    torch.manual_seed(1)
    with drawing_from(3, "a"):
        first = torch.rand(4)
    after = torch.rand(4)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(4), after)  # nobody else's draws are moved
    with drawing_from(3, "a"):
        assert torch.equal(torch.rand(4), first)
    with drawing_from(3, "b"):
        assert not torch.equal(torch.rand(4), first)
