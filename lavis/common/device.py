"""Choose the device of a run."""

from __future__ import annotations

import functools
import logging
import math
import re
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from lavis.common.errors import ConfigError

logger = logging.getLogger(__name__)
_DRIVER = Path("/proc/driver/nvidia/version")


def pick_device(
    name: str, setting: str = "run.device", cpu: str = "--options run.device=cpu"
) -> torch.device:
    """Turn a device's name into a device.

    Args:
        name: ``cuda``, ``cuda:N``, ``cpu``, or ``auto`` for a GPU if there is one. A GPU that is
            there and cannot be used is warned of.
        setting: where the name comes from, for the message.
        cpu: how the CPU is chosen there.

    Raises:
        ConfigError: the name is unknown, or no such device is visible or can be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and (driver := _driver()):
            logger.warning("%s: auto is the CPU, though a GPU is there: %s", setting, driver)
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", name):
        raise ConfigError(f"{setting}: {name!r} is none of cuda, cuda:N, cpu, auto")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    # NVML counts cards that a driver too old for this PyTorch cannot run.
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= visible:
        advice = f"On a machine without a GPU: {cpu}"
        if visible:
            advice = f"The last one is cuda:{visible - 1}"
        elif torch.version.cuda is None:
            advice = f"This PyTorch is built without CUDA. {advice}"
        elif driver := _driver():
            advice = f"A GPU is there: {driver}. To go without it: {cpu}"
        raise ConfigError(f"{setting} is {name} but {visible} CUDA devices are visible. {advice}")
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device; the host does not wait for a GPU to take it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # pinned already, it is itself


def _driver() -> str:
    """What keeps PyTorch from a GPU whose driver is loaded; empty without one."""
    try:
        told = _DRIVER.read_text(encoding="utf-8")
    except OSError:
        return ""
    version = re.search(r"\b\d+\.\d+(\.\d+)*\b", told)
    driver = f"the NVIDIA driver is {version[0] if version else 'of an unknown version'}"
    if torch.version.cuda is None:
        return f"{driver}, but this PyTorch is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
    else:
        reason = "CUDA_VISIBLE_DEVICES hides it"
    return f"{driver}, this PyTorch is built for CUDA {torch.version.cuda}: {reason}"


@functools.cache
def is_ampere(device: torch.device) -> bool:
    """Whether a GPU has compute capability 8.0 or above: bf16 instructions, FlashAttention.

    One that is only imagined (fake tensors) has.
    """
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def warn_of_emulation(device: torch.device, dtype: torch.dtype, setting: str) -> None:
    """Say that a GPU is slow in what ``setting`` asks for; results are those of any other."""
    if device.type == "cuda" and dtype == torch.bfloat16 and not is_ampere(device):
        logger.warning(
            "%s is bf16, of which %s has no instructions (compute capability below 8.0): they are "
            "emulated and slow; fp16 is fast there", setting, device,
        )  # fmt: skip


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
