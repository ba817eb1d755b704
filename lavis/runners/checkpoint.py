"""Checkpoints: what is trained, the optimizer, and how far the run is.

The file holds the original's entries (``model``, ``optimizer``, ``config``, ``scaler``, ``epoch``)
and ``progress``, ``metrics``, ``best``, ``data`` and ``versions`` of ours.
"""

from __future__ import annotations

import os
import platform
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeGuard

import torch

import lavis
from lavis.common.errors import WeightsError
from lavis.common.paths import replaces, require_checkpoint
from lavis.common.types import Metric
from lavis.datasets.plan import BatchPlan
from lavis.models.weights.files import is_state_dict, load_pickle, outline

_PACKAGES = ("torch", "transformers", "timm", "tiktoken", "safetensors")


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done over the whole run.
        steps_per_epoch: of the run that wrote it; must agree to resume inside an epoch.
        samples_per_step: over all processes.
        world_size: processes that the run began with, from which ``samples_per_step`` follows.
    """

    step: int
    steps_per_epoch: int
    samples_per_step: int = 0
    world_size: int = 1

    @property
    def epochs_done(self) -> int:
        """Completed epochs."""
        return self.step // self.steps_per_epoch

    @classmethod
    def saved(cls, content: dict[str, Any], label: object) -> Progress | None:
        """What a checkpoint's content says, in its own steps; the original's files do not hold it.

        Raises:
            WeightsError: the entry is damaged.
        """
        if "progress" not in content:
            return None
        entry: Any = content["progress"]
        with suppress(TypeError):
            progress = cls(**entry)
            if progress.step >= 0 and progress.steps_per_epoch >= 1:
                return progress
        raise WeightsError(f"{label}: its `progress` is damaged: {entry!r:.200}")

    @classmethod
    def of(cls, content: dict[str, Any], label: object, plan: BatchPlan) -> Progress:
        """What a checkpoint's content says, in steps of the plan that goes on from it.

        The original writes its files at the end of an epoch.

        Raises:
            WeightsError: the entry is damaged, or it stopped inside an epoch of another plan.
        """
        steps = plan.steps_per_epoch
        progress = cls.saved(content, label)
        if progress is None:
            return cls((content["epoch"] + 1) * steps, steps)
        same_step = progress.samples_per_step in (0, plan.samples_per_step)
        if progress.steps_per_epoch == steps and same_step:
            return progress
        if progress.step % progress.steps_per_epoch:
            raise WeightsError(
                f"{label} stopped inside an epoch of {progress.steps_per_epoch} steps, but this "
                f"configuration has {steps} steps per epoch: data, batch_size_train or "
                "accum_grad_iters differ. Resume from the checkpoint of a complete epoch"
            )
        return cls(progress.epochs_done * steps, steps)


@dataclass(frozen=True)
class Best:
    """The best validation so far.

    Attributes:
        value: of the metric.
        checkpoint: the file that was the best.
        metric: its name.
        data: fingerprint of the validation data.
    """

    value: float
    checkpoint: str
    metric: str = ""  # here and below, empty in what older files say
    data: str = ""

    @classmethod
    def of(cls, content: dict[str, Any], source: object, metric: Metric) -> Best | None:
        """The best by a metric that a checkpoint knows of; older files know their own alone."""
        with suppress(TypeError, AttributeError):
            value = (content.get("metrics") or {}).get(metric.name)
            best = cls(**content.get("best") or {"value": value, "checkpoint": str(source)})
            if best.metric in ("", metric.name) and isinstance(best.value, float):
                return best
        return None


def save_checkpoint(
    path: Path,
    *,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    scaler: dict[str, Any] | None,
    config: dict[str, Any],
    progress: Progress,
    metrics: dict[str, float] | None = None,
    best: Best | None = None,
    data: dict[str, str] | None = None,
) -> None:
    """Write a checkpoint so that ``path`` is either the old file or the whole new one.

    Args:
        data: fingerprints of the training data.

    Raises:
        OSError: e.g. a full disk; the old file is untouched.
    """
    content = {
        "model": model,
        "optimizer": optimizer,
        "config": config,
        "scaler": scaler,
        "epoch": progress.epochs_done - 1,  # the last complete one, as in the original
        "progress": asdict(progress),
        "metrics": metrics or {},
        "best": best and asdict(best),
        "data": data,
        "versions": software_versions(),
    }
    with replaces(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, without a second copy where links work."""
    with replaces(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            temporary.write_bytes(source.read_bytes())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project or of the original.

    Raises:
        WeightsError: the file is missing, damaged or no checkpoint.
    """
    path = require_checkpoint(path, "run.resume_ckpt_path")
    _check_sums(path)
    content = load_pickle(path)
    if not _is_checkpoint(content):
        raise WeightsError(
            f"{path} cannot be resumed: its `model`, `optimizer` and `epoch` are missing or "
            f"damaged; it holds {outline(content)}. To start from its weights alone, set "
            "model.load_finetuned and model.finetuned"
        )
    return content


def _check_sums(path: Path) -> None:
    """Compare every part of the file with its CRC-32, which ``torch.load`` does not do."""
    if not zipfile.is_zipfile(path):
        return  # cut short, or PyTorch's old format: reading it will tell
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    if damaged is not None:
        raise WeightsError(f"{path} is damaged: the checksum of its part {damaged} is wrong")


def _is_checkpoint(content: object) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(content, dict)
        and is_state_dict(content.get("model"))
        and isinstance(content.get("optimizer"), dict)
        and isinstance(content.get("epoch"), int)
    )


def software_versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    versions = {"lavis": lavis.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
