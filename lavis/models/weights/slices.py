"""A model without numbers, and what each process of several copies of its files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lavis.models.weights.files import final_dtype


def take_out(model: nn.Module) -> dict[str, Tensor]:
    """Put parameters on the meta device, in their final types, in place.

    Returns:
        What they held, by every name that they have: usually views of mapped files.
    """
    held = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    replace_parameters(
        model, lambda _, p: torch.empty(p.shape, dtype=final_dtype(p), device="meta")
    )
    return held


def replace_parameters(model: nn.Module, make: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Put others, made of a name and a parameter, in their place; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    named = {}
    for name, old in model.named_parameters(remove_duplicate=False):
        if old not in made:
            made[old] = nn.Parameter(make(name, old), requires_grad=old.requires_grad)
        named[name] = made[old]
    model.load_state_dict(named, strict=False, assign=True)


def own_rows(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """A process's share of the first dimension, as a view; what PyTorch's ``Shard(0)`` means."""
    shares = tensor.chunk(world_size)
    return shares[rank] if rank < len(shares) else tensor[:0]
