"""Choose the device of a run."""

from __future__ import annotations

import math
import re
import resource
import time

import torch
from torch import Tensor

from lavis.common.errors import ConfigError


def pick_device(
    name: str, setting: str = "run.device", cpu: str = "--options run.device=cpu"
) -> torch.device:
    """Turn a device's name into a device.

    Args:
        name: ``cuda``, ``cuda:N``, ``cpu``, or ``auto`` for a GPU if there is one.
        setting: where the name comes from, for the message.
        cpu: how the CPU is chosen there.

    Raises:
        ConfigError: the name is unknown or no such device is visible.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", name):
        raise ConfigError(f"{setting}: {name!r} is none of cuda, cuda:N, cpu, auto")
    device, visible = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= visible:
        advice = f"On a machine without a GPU: {cpu}"
        if visible:
            advice = f"The last one is cuda:{visible - 1}"
        elif torch.version.cuda is None:
            advice = f"This PyTorch is built without CUDA. {advice}"
        raise ConfigError(f"{setting} is {name} but {visible} CUDA devices are visible. {advice}")
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device; the host does not wait for a GPU to take it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # pinned already, it is itself


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations a second of a square matrix product, the best of a few.

    Args:
        size: rows and columns; by default so many that it takes moments.
    """
    size = size or (4096 if device.type == "cuda" else 768)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch has held on a GPU, or that this process has had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
