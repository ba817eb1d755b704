"""Random numbers that depend on what they are for, and on nothing that was drawn before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def drawing_from(*parts: int | str) -> Iterator[None]:
    """Have PyTorch draw from :func:`derived_seed` inside; outside it goes on as if nothing had."""
    with torch.random.fork_rng(devices=[]):
        # Only the CPU's generator: seeding all devices costs a hundred times as much.
        torch.default_generator.manual_seed(derived_seed(*parts))
        yield
