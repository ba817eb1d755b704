"""What a run that goes on must share with the run that wrote its checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lavis.common import dist
from lavis.common.errors import ConfigError, WeightsError
from lavis.common.optim import Schedule, build_schedule
from lavis.common.schema import Config, RunConfig
from lavis.datasets.annotations import Record
from lavis.models.weights.agreement import check_settings, saved_settings
from lavis.runners.checkpoint import Checkpoint, Progress

logger = logging.getLogger(__name__)
_ORDER = ("seed", "train_dataset_ratios")  # of an epoch's samples, besides data and step size
_RATE = (
    "lr_sched", "init_lr", "min_lr", "warmup_lr", "warmup_steps", "warmup_ratio", "lr_decay_rate",
    "max_epoch",
)  # fmt: skip


def fingerprint(datasets: Sequence[Any]) -> str:
    """How many records there are, and a hash of all in their order, wherever their files lie.

    It covers turns, words, the frames of videos and the tiles of pictures that are shown, and the
    names of media below the folder that holds them all, not what pictures show. Data sets without
    ``records`` are only counted.
    """
    records = [record for dataset in datasets for record in _records(dataset)]
    media = [[str(p) for p in (*r.images, r.video) if p is not None] for r in records]
    folders = {path.rpartition("/")[0] for paths in media for path in paths}
    start = len(os.path.commonpath(folders)) if folders else 0
    digest = hashlib.blake2b(digest_size=8)
    for record, paths in zip(records, media, strict=True):
        content: list[object] = [record.turns, [path[start:] for path in paths], record.words]
        content += [record.frames] if record.frames else []
        content += [record.grids] if record.grids else []
        digest.update(json.dumps(content).encode() + b"\n")
    return f"{sum(map(len, datasets))} samples, {digest.hexdigest()}"


def data_fingerprints(config: Config, dataset: Any) -> dict[str, str]:
    """The fingerprint of each block of ``datasets``, in their order."""
    parts = getattr(dataset, "datasets", [dataset])
    return {name: fingerprint([part]) for name, part in zip(config.datasets, parts, strict=False)}


def check_agreement(checkpoint: Checkpoint, config: Config, data: dict[str, str]) -> None:
    """Compare a checkpoint with the configuration and data that go on from it; needs no model.

    Args:
        data: what :func:`data_fingerprints` gave.

    Raises:
        WeightsError: it stopped inside an epoch whose rest would show other samples, or its
            weights would mean something else.
    """
    path, progress = checkpoint.path, checkpoint.progress
    check_settings(path, vars(checkpoint), config.model, training=True)
    changed = _changes(saved_settings(vars(checkpoint), "run"), config.run, _ORDER)
    if checkpoint.data is None:
        _warn(f"{path} does not say what it was trained on: data are not compared")
    elif list(checkpoint.data.values()) != list(data.values()):
        changed.append(f"datasets was {checkpoint.data}, now {data}")
    if not changed:
        return
    if progress is not None and progress.inside_epoch:
        raise WeightsError(
            f"{path} stopped inside an epoch, the rest of which would show other samples: "
            f"{'; '.join(changed)}. Set that back, or resume from the checkpoint of a complete "
            "epoch"
        )
    _warn(f"{path} goes on with other samples: {'; '.join(changed)}")


def warn_of_another_rate(
    checkpoint: Checkpoint, run: RunConfig, schedule: Schedule, step: int
) -> None:
    """Warn if the learning rate goes on otherwise than in the run that wrote a checkpoint."""
    saved, steps = saved_settings(vars(checkpoint), "run"), schedule.steps_per_epoch
    then = checkpoint.progress or Progress(step, steps)
    if not saved:
        return
    known = {key: saved.get(key, getattr(RunConfig, key)) for key in _RATE}
    try:
        before = build_schedule(replace(run, **known), then.steps_per_epoch).lr(then.step)
    except (ConfigError, TypeError, ValueError, ZeroDivisionError):
        return  # another project's settings
    now, changed = schedule.lr(step), _changes(saved, run, _RATE)
    if then.steps_per_epoch != steps:
        changed.append(f"an epoch had {then.steps_per_epoch} steps, now {steps}")
    if not math.isclose(before, now, rel_tol=1e-6, abs_tol=1e-15):
        _warn(
            f"the learning rate of step {step} is {now:.3g}, not {before:.3g} as in the run that "
            f"wrote {checkpoint.path}: {'; '.join(changed)}"
        )


def _warn(message: str) -> None:
    if dist.is_main():
        logger.warning("%s", message)


def _changes(saved: dict[str, Any], run: RunConfig, keys: Sequence[str]) -> list[str]:
    pairs = ((k, saved.get(k, getattr(RunConfig, k)), getattr(run, k)) for k in keys if saved)
    return [f"run.{key} was {then}, now {now}" for key, then, now in pairs if then != now]


def _records(dataset: Any) -> Iterator[Record]:
    for part in getattr(dataset, "datasets", ()):
        yield from _records(part)
    yield from getattr(dataset, "records", ())
