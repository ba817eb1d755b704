"""Weights written as safetensors, shard by shard: no more than one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
    """Write weights to files of bounded size, as :func:`save_shards`.

    Args:
        dtype: of every weight.
        limit: bytes of a shard; a single larger tensor is one by itself.

    Raises:
        WeightsError: a number is not finite in ``dtype``.
    """
    shards: list[dict[str, Callable[[], Tensor]]] = [{}]
    room = limit
    for name, weight in weights.items():
        size = torch.Size(weight.shape).numel() * dtype.itemsize
        if shards[-1] and size > room:
            shards.append({})
            room = limit
        shards[-1][name] = partial(converted, name, weight.read, dtype)
        room -= size
    save_shards(shards, folder)


def save_shards(shards: Sequence[Mapping[str, Callable[[], Tensor]]], folder: Path) -> None:
    """Write ``model.safetensors``, or several and their index, tensors made one file at a time."""
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        many = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"model{many}.safetensors"
        tensors = {name: make() for name, make in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        write_json(folder / "model.safetensors.index.json", content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as people read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def converted(name: str, read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    """A tensor as it is written.

    Raises:
        WeightsError: a number is not finite in ``dtype``.
    """
    tensor = read().detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # without a mask as large as it
        raise WeightsError(f"{name} is not finite in {dtype}: see --dtype")
    return tensor
