"""The checkpoints in a run's folder: which stay, and which is whole where another is not."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from lavis.common import dist
from lavis.common.errors import LavisError, WeightsError
from lavis.common.schema import Config
from lavis.common.types import Metric
from lavis.runners.checkpoint import Best, Checkpoint, copy_checkpoint

logger = logging.getLogger(__name__)
_ROLLING = re.compile(r"checkpoint_step_(\d+)\.pth")


@dataclass
class CheckpointFolder:
    """Writes a run's checkpoints.

    ``checkpoint_<epoch>.pth`` stay. Of ``checkpoint_step_<n>.pth``, written inside epochs, the
    newest ``keep_last`` stay. ``checkpoint_latest.pth`` is the newest of all,
    ``checkpoint_best.pth`` the best by the task's metric; both are links where the file system
    has them. ``best`` is known from the run before, and then from this one.
    """

    folder: Path
    keep_last: int
    metric: Metric
    best: Best | None = None

    def save(self, name: str, checkpoint: Checkpoint, measured_on: str = "") -> None:
        """Write ``checkpoint_<name>.pth`` and what follows from it.

        Args:
            measured_on: fingerprint of the data that gave the checkpoint's metrics.

        Raises:
            OSError: e.g. a full disk; all files are as before.
        """
        path, metric = self.path(name), self.metric
        value, best, better = checkpoint.metrics.get(metric.name), self.best, False
        if value is not None:
            if best is not None and best.data not in ("", measured_on):
                logger.warning("%s is no rival: it was measured on other data", best.checkpoint)
                best = None
            better = metric.is_better(value, best.value if best else None)
            if better:
                best = Best(value, str(self.path("best").absolute()), metric.name, measured_on)
        replace(checkpoint, best=best).write(path)
        self.best = best
        if name != "latest":
            copy_checkpoint(path, self.path("latest"))
        if better:
            copy_checkpoint(path, self.path("best"))
            logger.info("%s is the best so far: %s %.4f", path.name, metric.name, value)
        elif value is not None and best is not None:
            logger.info("the best is still %s: %.4f, not %.4f", best.checkpoint, best.value, value)
        for old in self._rolling()[: -self.keep_last]:
            old.unlink()

    def last_good(self) -> str:
        """A sentence that names the newest whole checkpoint of the folder."""
        good = newest_whole(self.folder)
        return f"The last whole checkpoint is {good}." if good else "No checkpoint was written yet."

    def path(self, name: str) -> Path:
        """Where a checkpoint is."""
        return self.folder / f"checkpoint_{name}.pth"

    def _rolling(self) -> list[Path]:
        found = [(m, p) for p in self.folder.iterdir() if (m := _ROLLING.fullmatch(p.name))]
        return [p for _, p in sorted((int(m[1]), p) for m, p in found)]


def newest_of(config: Config) -> Path | None:
    """Where ``run.resume_ckpt_path: auto`` goes on: the checkpoint that is farthest in training, of
    the runs in ``run.output_dir`` with this very configuration; nowhere if there is none.

    Every process calls this, and gets what the main one finds.
    """
    parent = Path(config.run.output_dir)
    return dist.by_main(lambda: newest_among(parent, config.tree, [""]))


def newest_among(parent: Path, tree: dict[str, Any], inside: Sequence[str]) -> Path | None:
    """As :func:`newest_of`, for runs in ``parent`` whose ``config.yaml`` says what ``tree`` says.

    Args:
        inside: folders of such a run; a checkpoint in the first of them goes before all others.
    """
    runs = [path.parent for path in parent.glob("*/config.yaml")]
    same = [run for run in runs if _same_settings(run / "config.yaml", tree)]
    for name in inside:
        if found := newest_whole(*(run / name for run in same)):
            return found
    logger.warning(
        "run.resume_ckpt_path: auto finds no checkpoint of a run of this configuration in %s "
        "(%d runs of others): it starts from the beginning", parent, len(runs) - len(same),
    )  # fmt: skip
    return None


def _same_settings(path: Path, tree: dict[str, Any]) -> bool:
    """Whether a run's ``config.yaml`` says what ``tree`` says, but for where to go on."""
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError):
        return False  # of a run that was killed before it began
    now = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(tree))))
    for settings in (saved, now):
        if isinstance(settings, dict) and isinstance(settings.get("run"), dict):
            settings["run"].pop("resume_ckpt_path", None)
    return saved == now


def newest_whole(*folders: Path, besides: Path | None = None) -> Path | None:
    """The checkpoint in folders that is farthest in training, among those that can be read."""
    candidates: list[tuple[int, bool, Path]] = []
    for path in (p for folder in folders for p in folder.glob("checkpoint_*.pth")):
        if path == besides:
            continue
        try:
            progress = Checkpoint.read(path).progress
        except (LavisError, OSError):
            continue
        # Of several names of one state, best is the one that says least about it.
        candidates.append((progress.step if progress else 0, "best" not in path.name, path))
    return max(candidates)[-1] if candidates else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to resume from.

    Raises:
        WeightsError: it is missing or damaged; the message offers the newest whole one beside it.
    """
    try:
        return Checkpoint.read(path)
    except WeightsError as error:
        good = newest_whole(path.parent, besides=path) if path.parent.is_dir() else None
        if good is None:
            raise
        raise WeightsError(
            f"{error}\nThe newest whole checkpoint beside it is {good}; resume from that with "
            f"--options run.resume_ckpt_path={good}"
        ) from error
