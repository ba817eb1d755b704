"""Checkpoints: what is trained, the optimizer, and how far the run is."""

from __future__ import annotations

import os
import platform
import shutil
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lavis
from lavis.common.errors import WeightsError, raised_as
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
        samples_per_step: over all processes; 0 in older files.
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

    @property
    def inside_epoch(self) -> bool:
        """Whether an epoch was begun and not completed."""
        return self.step % self.steps_per_epoch != 0


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


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on. In a file the fields are entries of these names.

    Attributes:
        model: what is trained, under the original's names.
        optimizer: PyTorch's state dict of it, with whole tensors, or nothing.
        config: the whole configuration, as plain values.
        scaler: state of the loss scale, where there is one.
        progress: how far the run is; ``None`` in the original's files.
        epoch: the last complete one; where there is ``progress``, that decides.
        metrics: of the validation just before.
        best: of the run so far.
        data: fingerprints of the training data.
        path: the file that it was read from.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    config: Any
    scaler: dict[str, Any] | None = None
    progress: Progress | None = None
    epoch: int = -1
    metrics: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    data: dict[str, str] | None = None
    path: Path | None = None

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a checkpoint of this project or of the original.

        Raises:
            WeightsError: the file is missing, damaged or no checkpoint.
        """
        path = require_checkpoint(path, "run.resume_ckpt_path")
        _check_sums(path)
        content = load_pickle(path)
        if not (
            isinstance(content, dict)
            and is_state_dict(content.get("model"))
            and isinstance(content.get("optimizer"), dict)
            and isinstance(content.get("epoch"), int)
        ):
            raise WeightsError(
                f"{path} cannot be resumed: its `model`, `optimizer` and `epoch` are missing or "
                f"damaged; it holds {outline(content)}. To start from its weights alone, set "
                "model.load_finetuned and model.finetuned"
            )
        metrics, data = content.get("metrics"), content.get("data")
        return cls(
            model=content["model"],
            optimizer=content["optimizer"],
            config=content.get("config"),
            scaler=content.get("scaler"),
            progress=_progress(path, content),
            epoch=content["epoch"],
            metrics=metrics if isinstance(metrics, dict) else {},
            best=_best(content.get("best")),
            data=data if isinstance(data, dict) else None,
            path=path,
        )

    def write(self, path: Path) -> None:
        """Write it so that ``path`` is either the old file or the whole new one.

        Raises:
            OSError: e.g. a full disk; the old file is untouched.
        """
        done = self.progress
        content = vars(self) | {
            "progress": done and asdict(done),
            "epoch": done.epochs_done - 1 if done else self.epoch,
            "best": self.best and asdict(self.best),
            "versions": software_versions(),
        }
        del content["path"]
        with replaces(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)

    def steps_in(self, plan: BatchPlan) -> int:
        """Optimizer steps done, in steps of the plan that goes on from here.

        Raises:
            WeightsError: it stopped inside an epoch of another plan.
        """
        steps, done = plan.steps_per_epoch, self.progress
        if done is None:
            return (self.epoch + 1) * steps
        if done.steps_per_epoch == steps and done.samples_per_step in (0, plan.samples_per_step):
            return done.step
        if done.inside_epoch:
            raise WeightsError(
                f"{self.path} stopped inside an epoch of {done.steps_per_epoch} steps, but this "
                f"configuration has {steps} steps per epoch: data, batch_size_train or "
                "accum_grad_iters differ. Resume from the checkpoint of a complete epoch"
            )
        return done.epochs_done * steps

    def best_by(self, metric: Metric) -> Best | None:
        """The best by a metric, as far as this file knows; older files know their own alone."""
        value = self.metrics.get(metric.name)
        best = self.best
        if best is None and isinstance(value, float):
            best = Best(value, str(self.path))
        return best if best and best.metric in ("", metric.name) else None


def _progress(path: Path, content: dict[str, Any]) -> Progress | None:
    """What a file says, in its own steps."""
    if "progress" not in content:
        return None
    with suppress(TypeError):
        progress = Progress(**content["progress"])
        if progress.step >= 0 and progress.steps_per_epoch >= 1:
            return progress
    raise WeightsError(f"{path}: its `progress` is damaged: {content['progress']!r:.200}")


def _best(entry: Any) -> Best | None:
    with suppress(TypeError):
        best = Best(**entry)
        return best if isinstance(best.value, float) else None
    return None


def copy_checkpoint(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, without a second copy where links work."""
    with replaces(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _check_sums(path: Path) -> None:
    """Compare every part of the file with its CRC-32, which ``torch.load`` does not do."""
    if not zipfile.is_zipfile(path):
        return  # cut short, or PyTorch's old format: reading it will tell
    errors = zipfile.BadZipFile, EOFError, OSError
    with raised_as(WeightsError, f"{path} is damaged", *errors), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise WeightsError(f"{path} is damaged: the checksum of its part {damaged} is wrong")


def software_versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    versions = {"lavis": lavis.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
