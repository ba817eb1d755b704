"""What a run writes while it goes: progress bar, ``log.txt``, TensorBoard, W&B, ``loss.png``."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lavis.common import dist
from lavis.common.device import matmul_peak, peak_memory
from lavis.common.schema import Config
from lavis.common.types import DTYPES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, summed over all processes.

    Attributes:
        step: counted from 0.
        epoch: counted from 0.
        loss_sum: cross-entropy of all supervised tokens, in nats.
        supervised: how many there are; 0 if the step was skipped.
        tokens: tokens computed, supervised or not.
        fillers: tokens computed for nothing, where a process had no samples left.
        images: images encoded.
        samples: conversations.
        lr: learning rate.
        grad_norm: before clipping.
    """

    step: int
    epoch: int
    loss_sum: float
    supervised: float
    tokens: float
    fillers: float
    images: float
    samples: float
    lr: float
    grad_norm: float


class RunLog:
    """Averages what every step reports and writes it every ``run.log_freq`` steps.

    Every process makes one; only the main one's reaches the folder and the terminal.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        done_steps: int,
        config: Config,
        model: nn.Module,
        device: torch.device,
    ) -> None:
        """Open the log.

        Args:
            folder: gets ``log.txt`` (one JSON object a line), TensorBoard events, ``loss.png``.
            total_steps: optimizer steps of the whole run.
            done_steps: steps done before this process.
            model: its ``training_flops(tokens, images)``, if it has that, gives the utilisation, as
                a share of the peak of ``dtype``, or of autocast's.
            device: whose memory is watched.
        """
        main, run = dist.is_main(), config.run
        self.folder, self.log_freq = folder, run.log_freq
        self._total, self._done, self._device = total_steps, done_steps, device
        self._flops: Callable[[int, int], float] | None = getattr(model, "training_flops", None)
        if self._flops is not None:
            own = getattr(model, "dtype", torch.float32)
            dtype = DTYPES[run.autocast_dtype] if run.amp else own
            self._peak = sum(dist.gather(matmul_peak(device, dtype)))
        self._log = (folder / "log.txt" if main else Path(os.devnull)).open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps, initial=done_steps, desc="training", unit="step", smoothing=0.1,
            file=None if main else self._log,
        )  # fmt: skip
        self._board = _tensorboard(folder) if main else None
        self._wandb = _wandb(folder, config) if main and run.wandb_project is not None else None
        self._curve: list[tuple[int, float]] = []
        self._valid: list[tuple[int, float]] = []
        self._reset()

    def step(self, report: StepReport) -> None:
        """Take in one optimizer step."""
        self._reports.append(report)
        self._done = report.step + 1
        line = self._averages()
        self._bar.set_description(f"epoch {report.epoch}", refresh=False)
        self._bar.set_postfix_str(
            f"loss {line['loss']:.4f}, lr {report.lr:.2e}, {line['tokens_per_s']:,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update()
        if len(self._reports) >= self.log_freq:
            self.flush()

    def flush(self) -> None:
        """Write the averages since the last line, if there are any."""
        if self._reports:
            line = self._averages()
            self.write(line)
            self._curve.append((self._done, line["loss"]))
            self._send("train", line)
            self._reset()

    def write(self, line: dict[str, Any]) -> None:
        """Write one JSON line. A number that is not finite becomes null, as JSON has none.

        A line with ``checkpoint`` carries the numbers of a validation, too.
        """
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
        }
        self._log.write(json.dumps({"time": time.time(), **finite}) + "\n")
        self._log.flush()
        if "checkpoint" in line:
            self._send("valid", {k: v for k, v in line.items() if isinstance(v, float)})
            if "valid_loss" in line:
                self._valid.append((self._done, line["valid_loss"]))

    def close(self) -> None:
        """Write what is left, and the curve. A full disk is logged, not raised."""
        self._bar.close()
        try:
            with self._log:
                self.flush()
            if self._curve and dist.is_main():
                draw_loss(self._curve, self.folder / "loss.png", self._valid)
            if self._board is not None:
                self._board.close()
        except OSError as error:
            logger.error("%s: the log is incomplete: %s", self.folder, error)
        if self._wandb is not None:
            self._wandb.finish()

    def _averages(self) -> dict[str, Any]:
        """A line: over the steps since the last one."""
        last, seconds = self._reports[-1], max(time.perf_counter() - self._since, 1e-9)
        loss_sum, supervised, tokens, fillers, images, samples = (
            sum(getattr(r, name) for r in self._reports)
            for name in ("loss_sum", "supervised", "tokens", "fillers", "images", "samples")
        )
        line = {
            "step": last.step,
            "epoch": last.epoch,
            "lr": last.lr,
            "grad_norm": last.grad_norm,
            "loss": loss_sum / supervised if supervised else math.nan,
            "supervised_tokens": int(supervised),
            "supervised_tokens_per_s": supervised / seconds,
            "tokens_per_s": tokens / seconds,
            "samples_per_s": samples / seconds,
            "padding_share": fillers / max(tokens + fillers, 1),
            "peak_memory_gb": peak_memory(self._device) / 1e9,
            "eta_s": (self._total - self._done) * seconds / len(self._reports),
        }
        if self._flops is not None:
            line["flops_utilisation"] = self._flops(tokens, images) / seconds / self._peak
        return line

    def _send(self, group: str, numbers: dict[str, Any]) -> None:
        named = {
            f"{group}/{k}": v for k, v in numbers.items() if k not in ("step", "epoch", "eta_s")
        }
        if self._board is not None:
            for key, value in named.items():
                self._board.add_scalar(key, value, self._done)
        if self._wandb is not None:
            self._wandb.log(named, step=self._done)

    def _reset(self) -> None:
        self._reports: list[StepReport] = []
        self._since = time.perf_counter()


def draw_loss(
    curve: list[tuple[int, float]], path: Path, valid: list[tuple[int, float]] | None = None
) -> None:
    """Draw loss over optimizer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*curve, strict=True)
    axes.plot(steps, losses, marker="." if len(steps) < 50 else "", label="training")
    if valid:
        axes.plot(*zip(*valid, strict=True), marker="o", label="validation")
        axes.legend()
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("no TensorBoard events: pip install tensorboard")
        return None
    return SummaryWriter(str(folder))


def _wandb(folder: Path, config: Config) -> Any:
    import wandb

    return wandb.init(
        project=config.run.wandb_project,
        mode=config.run.wandb_mode,
        dir=str(folder),
        name=str(folder.relative_to(config.run.output_dir)),
        config=config.tree,
    )
