"""What a run tells: the numbers in ``log.txt``, and Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from tqdm import tqdm

from lavis.common.config import load_config
from lavis.common.errors import ConfigError
from lavis.runners.watch import RunLog, StepReport
from tests.conftest import DEMO
from tests.runners.test_runner import SHORT, prepare, steps


def report(step: int, **numbers: Any) -> StepReport:
    given: dict[str, Any] = {
        "loss_sum": 6.0, "supervised": 3, "tokens": 30, "fillers": 0, "images": 1, "samples": 2,
        "lr": 0.25, "grad_norm": 0.5,
    }  # fmt: skip
    return StepReport(step=step, epoch=step // 4, **given | numbers)


class Model(nn.Module):
    @staticmethod
    def training_flops(tokens: int, images: int) -> float:
        return 100.0 * tokens + 1000.0 * images


def open_log(
    folder: Path, total: int, done: int, log_freq: int, model: nn.Module | None = None
) -> RunLog:
    config = load_config(DEMO / "train.yaml", [f"run.log_freq={log_freq}"])
    return RunLog(folder, total, done, config, model or nn.Module(), torch.device("cpu"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_averages_over_the_steps_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr("lavis.runners.watch.matmul_peak", lambda *_: 10_000.0)
    watch = open_log(tmp_path, 10, 4, 2, Model())
    watch.step(report(4))
    now += 4.0
    watch.step(report(5, loss_sum=10.0, supervised=1, tokens=50, fillers=20, samples=1, lr=0.125))
    watch.close()
    (line,) = lines(tmp_path)
    assert isinstance(line.pop("time"), float)
    assert line.pop("peak_memory_gb") > 0.01
    assert line == {
        "step": 5,
        "epoch": 1,
        "lr": 0.125,
        "grad_norm": 0.5,
        "loss": 4.0,  # of 4 tokens, 16 nats
        "supervised_tokens": 4,
        "supervised_tokens_per_s": 1.0,
        "tokens_per_s": 20.0,
        "samples_per_s": 0.75,
        "padding_share": 0.2,  # 20 of 100
        "eta_s": 8.0,  # 4 steps left, 2 s each
        "flops_utilisation": 0.25,  # 10,000 in 4 s of 10,000 a second
    }


@pytest.mark.parametrize(("amp", "dtype"), [("false", torch.bfloat16), ("true", torch.float16)])
def test_the_peak_is_of_the_type_that_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: str, dtype: torch.dtype
) -> None:
    measured = []
    monkeypatch.setattr(
        "lavis.runners.watch.matmul_peak", lambda device, kind: measured.append(kind) or 1.0
    )
    model = Model()
    model.dtype = torch.bfloat16
    config = load_config(DEMO / "train.yaml", [f"run.amp={amp}", "run.autocast_dtype=fp16"])
    RunLog(tmp_path, 1, 0, config, model, torch.device("cpu")).close()
    assert measured == [dtype]


def test_a_line_without_a_supervised_token_has_no_loss(tmp_path: Path) -> None:
    watch = open_log(tmp_path, 2, 0, 1)
    watch.step(report(0, loss_sum=0.0, supervised=0, grad_norm=math.inf))
    watch.step(report(1))
    watch.close()
    assert [line["loss"] for line in lines(tmp_path)] == [None, 2.0]
    assert [line["grad_norm"] for line in lines(tmp_path)] == [None, 0.5]
    assert "flops_utilisation" not in lines(tmp_path)[0]  # nothing is known of the model
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_time_left_without_a_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar that is switched off (``TQDM_DISABLE=1``) counts nothing."""
    monkeypatch.setattr("lavis.runners.watch.tqdm", partial(tqdm, disable=True))
    watch = open_log(tmp_path, 4, 0, 1)
    for step in range(4):
        watch.step(report(step))
    watch.close()
    assert [line["eta_s"] > 0 for line in lines(tmp_path)] == [True] * 3 + [False]


def test_what_is_left_is_written_at_the_end(tmp_path: Path) -> None:
    watch = open_log(tmp_path, 5, 0, 2)
    for step in range(3):
        watch.step(report(step))
    watch.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_numbers_of_a_run(tmp_path: Path) -> None:
    runner = prepare(tmp_path, *SHORT)
    runner.train()
    of_steps = steps(runner.folder)
    assert len(of_steps) == 9
    for line in of_steps:
        rates = ("tokens_per_s", "supervised_tokens_per_s", "samples_per_s", "peak_memory_gb")
        assert all(line[name] > 0 for name in rates)
        assert line["tokens_per_s"] > line["supervised_tokens_per_s"]
        assert line["tokens_per_s"] > line["samples_per_s"]
        assert line["flops_utilisation"] > 0  # how fast is not for a test to say
        assert line["padding_share"] == 0  # one process
        assert line["peak_memory_gb"] < 100
    assert [line["eta_s"] > 0 for line in of_steps] == [True] * 8 + [False]


# --- Weights & Biases -----------------------------------------------------------------------


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")  # whatever the run says, no network
    monkeypatch.setenv("WANDB_SILENT", "true")
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind))
    options = ("run.max_epoch=1", "run.wandb_project=mine", "run.wandb_mode=offline")
    runner = prepare(tmp_path, *SHORT, *options)
    runner.train()
    (folder,) = (runner.folder / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    wanted = (b"train/loss", b"train/supervised_tokens_per_s", b"max_epoch")
    deadline = time.monotonic() + 30  # its own process writes it
    while not all(word in file.read_bytes() for word in wanted):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    missing = {"wandb": "none-such-package"}
    monkeypatch.setattr(metadata, "version", lambda name: version(missing.get(name, name)))
    with pytest.raises(ConfigError) as caught:
        prepare(tmp_path, *SHORT, "run.wandb_project=mine")
    assert str(caught.value) == (
        "run.wandb_project needs wandb>=0.30, which is not installed. Install with: "
        "pip install -e '.[wandb]'"
    )


def test_no_tensorboard_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.INFO):
        open_log(tmp_path, 1, 0, 1).close()
    assert caplog.messages == ["no TensorBoard events: pip install tensorboard"]
