"""Processes, their devices, and a name for their run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import OmegaConf

from lavis.common import dist
from lavis.common.device import pick_device
from lavis.common.errors import ConfigError
from lavis.common.schema import Config, RunConfig
from lavis.runners.strategy import strategy_name


@contextmanager
def distributed(run: RunConfig) -> Iterator[torch.device]:
    """Join the other processes of a run, if there are any, and leave them at the end.

    Yields:
        This process's device.

    Raises:
        ConfigError: ``run.strategy`` does not fit the number of processes, or no such device.
    """
    world = dist.launched_world_size()
    name = strategy_name(run, world)
    device_name = run.device
    if device_name == "cuda" and world > 1:
        device_name = f"cuda:{dist.local_rank()}"
    device = pick_device(device_name)
    with dist.process_group(device.type, always=name in ("fsdp2", "deepspeed")):
        yield device


def new_job_id(run: RunConfig) -> str:
    """A name for the run's folder; the same in all processes. Making the folder reserves it.

    Raises:
        ConfigError: on every process, if the main one cannot make the folder.
    """
    name = error = None
    if dist.is_main():
        try:
            name = _make_new(Path(run.output_dir), time.strftime("%Y%m%d%H%M%S"))
        except OSError as caught:
            error = f"run.output_dir: no folder can be made in {run.output_dir}: {caught}"
    name, error = dist.from_main((name, error))
    if error:
        raise ConfigError(error)
    return str(name)


def _make_new(parent: Path, name: str) -> str:
    parent.mkdir(parents=True, exist_ok=True)
    number, chosen = 1, name
    while True:
        try:
            (parent / chosen).mkdir()
        except FileExistsError:
            number += 1
            chosen = f"{name}-{number}"
        else:
            return chosen


def make_folder(folder: Path, config: Config) -> Path:
    """Make a run's folder and write its ``config.yaml``.

    Raises:
        ConfigError: on every process, if the main one cannot.
    """
    error = None
    if dist.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(config.tree), folder / "config.yaml")
        except OSError as caught:
            error = f"run.output_dir: {folder} cannot be made: {caught}"
    if error := dist.from_main(error):
        raise ConfigError(error)
    return folder
