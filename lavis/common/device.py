"""Choose the device of a run."""

from __future__ import annotations

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
