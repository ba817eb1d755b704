"""Choose the device of a run."""

from __future__ import annotations

import math
import resource
import time

import torch

from lavis.common.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Turn ``run.device`` into a device.

    Args:
        name: ``cuda``, ``cuda:N``, ``cpu``, or ``auto`` for a GPU if there is one.

    Raises:
        ConfigError: the name is unknown or no such device is visible.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"run.device: {name!r} is none of cuda, cuda:N, cpu, auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device is {name} but {torch.cuda.device_count()} CUDA devices are visible. "
            "On a machine without a GPU: --options run.device=cpu"
        )
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"run.device: {name!r} is none of cuda, cuda:N, cpu, auto")
    return device


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
