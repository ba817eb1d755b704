"""What a run tells while it goes: progress bar, ``log.txt``, TensorBoard, ``loss.png``."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


class Watch:
    """Averages what every step reports and writes it every ``log_freq`` steps.

    Args:
        folder: gets ``log.txt`` (one JSON object a line), TensorBoard events and ``loss.png``.
        total_steps: optimizer steps of the whole run.
        done_steps: steps done before this process.
        log_freq: steps between two lines.
    """

    def __init__(self, folder: Path, total_steps: int, done_steps: int, log_freq: int) -> None:
        self.folder = folder
        self._total = total_steps
        self.log_freq = log_freq
        self._bar = tqdm(
            total=total_steps, initial=done_steps, desc="training", unit="step", smoothing=0.1
        )
        self._log = (folder / "log.txt").open("a", encoding="utf-8")
        self._board = _tensorboard(folder)
        self._curve: list[tuple[int, float]] = []
        self._last: dict[str, float] = {}
        self._reset()

    def step(
        self, *, step: int, epoch: int, loss_sum: float, supervised: int, tokens: int,
        samples: int, lr: float, grad_norm: float,
    ) -> None:  # fmt: skip
        """Take in one optimizer step; ``step`` counts from 0, ``tokens`` includes unsupervised."""
        self._loss_sum += loss_sum
        self._supervised += supervised
        self._tokens += tokens
        self._samples += samples
        self._steps += 1
        self._last = {"step": step, "epoch": epoch, "lr": lr, "grad_norm": grad_norm}
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.set_postfix_str(
            f"loss {self._loss_sum / max(self._supervised, 1):.4f}, lr {lr:.2e}, "
            f"{self._tokens / seconds:,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update()
        if self._steps >= self.log_freq:
            self.flush()

    def flush(self) -> None:
        """Write the averages since the last line, if there are any."""
        if not self._steps:
            return
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rate = self._steps / seconds
        line = {
            **self._last,
            "loss": self._loss_sum / max(self._supervised, 1),
            "supervised_tokens": self._supervised,
            "tokens_per_s": self._tokens / seconds,
            "samples_per_s": self._samples / seconds,
            "eta_s": (self._total - self._bar.n) / rate,
        }
        self.write(line)
        self._curve.append((int(self._last["step"]) + 1, line["loss"]))
        if self._board is not None:
            for key in ("loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s"):
                self._board.add_scalar(f"train/{key}", line[key], self._last["step"] + 1)
        self._reset()

    def write(self, line: dict[str, Any]) -> None:
        """Write one JSON line. A number that is not finite becomes null, as JSON has none."""
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
        }
        self._log.write(json.dumps({"time": time.time(), **finite}) + "\n")
        self._log.flush()

    def close(self) -> None:
        """Write what is left, and the curve."""
        self.flush()
        self._bar.close()
        self._log.close()
        if self._board is not None:
            self._board.close()
        if self._curve:
            draw_loss(self._curve, self.folder / "loss.png")

    def _reset(self) -> None:
        self._loss_sum, self._supervised, self._tokens, self._samples, self._steps = 0.0, 0, 0, 0, 0
        self._since = time.perf_counter()


def draw_loss(curve: list[tuple[int, float]], path: Path) -> None:
    """Draw loss over optimizer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*curve, strict=True)
    axes.plot(steps, losses, marker="." if len(steps) < 50 else "")
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("no TensorBoard events: pip install tensorboard")
        return None
    return SummaryWriter(str(folder))
