"""Weights written as safetensors, shard by shard: no more than one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lavis.common.errors import WeightsError


class Weight(NamedTuple):
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Weight:
        """One that is there already, perhaps as a view of a file."""
        return cls(tuple(tensor.shape), lambda: tensor)


def write_shards(
    weights: Mapping[str, Weight], folder: Path, *, dtype: torch.dtype, limit: float
) -> None:
    """Write ``model.safetensors``, or several and their index.

    Args:
        dtype: of every weight.
        limit: bytes of a shard; a single larger tensor is one by itself.

    Raises:
        WeightsError: a number is not finite in ``dtype``.
    """
    shards: list[list[str]] = [[]]
    room = limit
    for name, weight in weights.items():
        size = torch.Size(weight.shape).numel() * dtype.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    index: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        many = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"model{many}.safetensors"
        tensors = {name: _converted(name, weights[name], dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        total += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _converted(name: str, weight: Weight, dtype: torch.dtype) -> Tensor:
    tensor = weight.read().detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(tensor).all():
        raise WeightsError(f"{name} is not finite in {dtype}: see --dtype")
    return tensor
