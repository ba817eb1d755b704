"""What a run tells while it goes: progress bar, ``log.txt``, TensorBoard, W&B, ``loss.png``."""

from __future__ import annotations

import json
import logging
import math
import time
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
    supervised: int
    tokens: int
    fillers: int
    images: int
    samples: int
    lr: float
    grad_norm: float


class Quiet:
    """Watches nothing: for all processes but the main one."""

    def step(self, report: StepReport) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def write(self, line: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Watch:
    """Averages what every step reports and writes it every ``log_freq`` steps.

    Args:
        folder: gets ``log.txt`` (one JSON object a line), TensorBoard events and ``loss.png``.
        total_steps: optimizer steps of the whole run.
        done_steps: steps done before this process.
        log_freq: steps between two lines.
        model: its ``training_flops(tokens, images)``, if it has that, gives the utilisation.
        peak: floating-point operations a second that all devices reach in a matrix product.
        device: whose memory is watched.
        wandb: an open Weights & Biases run.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        done_steps: int,
        log_freq: int,
        *,
        model: Any = None,
        peak: float = math.nan,
        device: torch.device | None = None,
        wandb: Any = None,
    ) -> None:
        self.folder = folder
        self._total = total_steps
        self.log_freq = log_freq
        self._flops = getattr(model, "training_flops", None)
        self._peak, self._device = peak, device or torch.device("cpu")
        self._bar = tqdm(
            total=total_steps, initial=done_steps, desc="training", unit="step", smoothing=0.1
        )
        self._log = (folder / "log.txt").open("a", encoding="utf-8")
        self._board = _tensorboard(folder)
        self._wandb = wandb
        self._curve: list[tuple[int, float]] = []
        self._valid: list[tuple[int, float]] = []
        self._reset()

    def step(self, report: StepReport) -> None:
        """Take in one optimizer step."""
        self._reports.append(report)
        loss, _, seconds = self._averages()
        rate = sum(r.tokens for r in self._reports) / seconds
        self._bar.set_description(f"epoch {report.epoch}", refresh=False)
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, lr {report.lr:.2e}, {rate:,.0f} tokens/s", refresh=False
        )
        self._bar.update()
        if len(self._reports) >= self.log_freq:
            self.flush()

    def flush(self) -> None:
        """Write the averages since the last line, if there are any."""
        if not self._reports:
            return
        loss, supervised, seconds = self._averages()
        last = self._reports[-1]

        def total(name: str) -> int:
            return sum(getattr(r, name) for r in self._reports)

        tokens, fillers = total("tokens"), total("fillers")
        line: dict[str, Any] = {
            "step": last.step,
            "epoch": last.epoch,
            "lr": last.lr,
            "grad_norm": last.grad_norm,
            "loss": loss,
            "supervised_tokens": supervised,
            "supervised_tokens_per_s": supervised / seconds,
            "tokens_per_s": tokens / seconds,
            "samples_per_s": total("samples") / seconds,
            "padding_share": fillers / max(tokens + fillers, 1),
            "peak_memory_gb": peak_memory(self._device) / 1e9,
            "eta_s": (self._total - self._bar.n) * seconds / len(self._reports),
        }
        if self._flops is not None:
            flops = self._flops(tokens, total("images"))
            line["flops_utilisation"] = flops / seconds / self._peak
        self.write(line)
        self._curve.append((last.step + 1, loss))
        self._send("train", line, last.step + 1)
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
            numbers = {k: v for k, v in line.items() if isinstance(v, float)}
            self._send("valid", numbers, int(self._bar.n))
            if "valid_loss" in numbers:
                self._valid.append((int(self._bar.n), numbers["valid_loss"]))

    def close(self) -> None:
        """Write what is left, and the curve. A full disk is told, not raised."""
        self._bar.close()
        try:
            with self._log:
                self.flush()
            if self._curve:
                draw_loss(self._curve, self.folder / "loss.png", self._valid)
            if self._board is not None:
                self._board.close()
        except OSError as error:
            logger.error("%s: the log is incomplete: %s", self.folder, error)
        if self._wandb is not None:
            self._wandb.finish()

    def _averages(self) -> tuple[float, int, float]:
        supervised = sum(r.supervised for r in self._reports)
        loss_sum = sum(r.loss_sum for r in self._reports)
        loss = loss_sum / supervised if supervised else math.nan
        return loss, supervised, max(time.perf_counter() - self._since, 1e-9)

    def _send(self, group: str, numbers: dict[str, Any], step: int) -> None:
        named = {
            f"{group}/{k}": v for k, v in numbers.items() if k not in ("step", "epoch", "eta_s")
        }
        if self._board is not None:
            for key, value in named.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(named, step=step)

    def _reset(self) -> None:
        self._reports: list[StepReport] = []
        self._since = time.perf_counter()


def build_watch(
    folder: Path, total: int, done: int, config: Config, model: nn.Module, device: torch.device
) -> Watch | Quiet:
    """The watch of this process."""
    peak = 0.0
    if hasattr(model, "training_flops"):
        dtype = DTYPES[config.run.autocast_dtype] if config.run.amp else torch.float32
        peak = sum(dist.gather(matmul_peak(device, dtype)))
    if not dist.is_main():
        return Quiet()
    return Watch(
        folder,
        total,
        done,
        config.run.log_freq,
        model=model,
        peak=peak,
        device=device,
        wandb=_wandb(folder, config),
    )


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
    if config.run.wandb_project is None:
        return None
    import wandb

    return wandb.init(
        project=config.run.wandb_project,
        mode=config.run.wandb_mode,
        dir=str(folder),
        name=folder.name,
        config=config.tree,
    )
