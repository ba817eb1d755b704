"""A model without numbers, and what each process of several copies of its files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavis.models.weights.files import final_dtype


def take_out(model: nn.Module) -> dict[str, Tensor]:
    """Put parameters on the meta device, in their final types, in place.

    Returns:
        What they held, by every name that they have: usually views of mapped files.
    """
    held: dict[str, Tensor] = {}
    empty: dict[nn.Parameter, nn.Parameter] = {}  # a tied one stays tied
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in empty:
                meta = torch.empty(parameter.shape, dtype=final_dtype(parameter), device="meta")
                empty[parameter] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
            held[f"{prefix}.{name}" if prefix else name] = parameter.detach()
            module._parameters[name] = empty[parameter]
    return held


def own_rows(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """A process's share of the first dimension, as a view; what PyTorch's ``Shard(0)`` means."""
    shares = tensor.chunk(world_size)
    return shares[rank] if rank < len(shares) else tensor[:0]
