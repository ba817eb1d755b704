"""Processes, their devices, how they share the model, and a folder for their run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lavis.common import dist
from lavis.common.device import pick_device
from lavis.common.errors import ConfigError, raised_as
from lavis.common.packages import check_packages
from lavis.common.schema import RunConfig
from lavis.runners.strategy import DDPStrategy, FSDP2Strategy, Strategy


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


def strategy_name(run: RunConfig, world: int) -> str:
    """The strategy that ``run`` asks for, on so many processes.

    ``strategy`` names it; ``fsdp`` and ``runner: deepspeed_runner`` are the original's names for
    two of them, and ``--use-deepspeed`` sets ``strategy``.

    Raises:
        ConfigError: the settings contradict each other, or DeepSpeed is not installed.
    """
    asked: dict[str, str] = {}
    if run.strategy != "auto":
        asked[run.strategy] = f"run.strategy is {run.strategy}"
    if run.fsdp:
        asked.setdefault("fsdp2", "run.fsdp is true")
    if run.runner == "deepspeed_runner":
        asked.setdefault("deepspeed", "run.runner is deepspeed_runner")
    if run.deepspeed_config is not None and "deepspeed" not in asked:
        raise ConfigError(
            "run.deepspeed_config is given, but DeepSpeed is not chosen: set run.strategy: "
            "deepspeed (or start with --use-deepspeed), or remove the section"
        )
    if len(asked) > 1:
        raise ConfigError(f"{', but '.join(asked.values())}; leave one of them out")
    name = next(iter(asked), "ddp" if world > 1 else "single")
    if name == "single" and world > 1:
        raise ConfigError(
            f"run.strategy is single, but {world} processes were started; use auto, ddp or fsdp2, "
            "or start train.py alone"
        )
    if name == "deepspeed":
        check_packages("deepspeed", "run.strategy: deepspeed")
    return name


def build_strategy(run: RunConfig, device: torch.device) -> Strategy:
    """The strategy that ``run`` asks for; raises as :func:`strategy_name`."""
    name = strategy_name(run, dist.world_size())
    if name == "deepspeed":
        from lavis.runners.deepspeed import DeepSpeedStrategy

        return DeepSpeedStrategy(run, device)
    return {"single": Strategy, "ddp": DDPStrategy, "fsdp2": FSDP2Strategy}[name](run, device)


def new_job_id(run: RunConfig) -> str:
    """A name for the run's folder; the same in all processes. Making the folder reserves it.

    Raises:
        ConfigError: on every process, if the main one cannot make the folder.
    """
    return dist.by_main(lambda: _make_new(Path(run.output_dir), time.strftime("%Y%m%d%H%M%S")))


def _make_new(parent: Path, name: str) -> str:
    chosen, number = name, 1
    with raised_as(ConfigError, f"run.output_dir: no folder can be made in {parent}", OSError):
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):
                (parent / chosen).mkdir()
                return chosen
            number += 1
            chosen = f"{name}-{number}"


def make_folder(folder: Path, tree: dict[str, Any]) -> None:
    """Make a run's folder and write its ``config.yaml``, which says what ``tree`` says.

    Raises:
        ConfigError: on every process, if the main one cannot.
    """
    what = f"run.output_dir: {folder} cannot be made"
    with dist.raise_together(), raised_as(ConfigError, what, OSError):
        if dist.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(tree), folder / "config.yaml")
