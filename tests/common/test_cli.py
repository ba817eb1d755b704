"""What every command shares: errors without a traceback, devices."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from lavis.common import device
from lavis.common.cli import run_cli
from lavis.common.device import pick_device
from lavis.common.errors import ConfigError, DataError, LavisError, WeightsError


def _status(main: object) -> object:
    with pytest.raises(SystemExit) as caught:
        run_cli(main)  # type: ignore[arg-type]
    return caught.value.code


@pytest.mark.parametrize("kind", [LavisError, ConfigError, DataError, WeightsError])
def test_an_error_of_the_user_is_one_line(
    kind: type[LavisError], capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise kind("the file x is missing")

    assert _status(main) == 2
    assert capsys.readouterr() == ("", "error: the file x is missing\n")


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    assert _status(main) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_an_error_of_ours_keeps_its_traceback() -> None:
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(main)


def test_closed_streams_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``<&- >&- 2>&-``: nothing to read, and what is written is lost."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    def main() -> int:
        assert sys.stdin.readline() == "" and not sys.stdin.isatty()
        sys.stdout.write("lost")
        sys.stderr.write("lost")
        return 0

    assert _status(main) == 0
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


@pytest.mark.parametrize("status", [0, 7])
def test_status(status: int) -> None:
    assert _status(lambda: status) == status


@pytest.mark.parametrize(
    "name", ["gpu", "mps", "meta", "", "cuda:x", "CUDA", "cuda:-1", "cuda:007", "cpu:1", "0"]
)
def test_unknown_device(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pick_device(name)
    assert str(caught.value) == f"run.device: {name!r} is none of cuda, cuda:N, cpu, auto"


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError) as caught:
        pick_device("cuda:2")
    assert str(caught.value) == (
        "run.device is cuda:2 but 2 CUDA devices are visible. The last one is cuda:1"
    )


@pytest.mark.parametrize("built", [None, "13.0"])
def test_no_device_is_there(monkeypatch: pytest.MonkeyPatch, built: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", built)
    why = "" if built else "This PyTorch is built without CUDA. "
    for arguments, setting, cpu in [
        ((), "run.device", "--options run.device=cpu"),
        (("--device", "--device cpu"), "--device", "--device cpu"),
    ]:
        with pytest.raises(ConfigError) as caught:
            pick_device("cuda", *arguments)
        assert str(caught.value) == (
            f"{setting} is cuda but 0 CUDA devices are visible. {why}"
            f"On a machine without a GPU: {cpu}"
        )


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")


OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update"


@pytest.fixture()
def old_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four cards that NVML counts, and a driver that this PyTorch cannot use."""

    def init() -> None:
        raise RuntimeError(f"{TOO_OLD}\nmore")

    (tmp_path / "version").write_text(OLD)
    monkeypatch.setattr(device, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


WHY = f"the NVIDIA driver is 535.183.01, this PyTorch is built for CUDA 13.0: {TOO_OLD}"


@pytest.mark.usefixtures("old_driver")
def test_a_driver_too_old_is_named(caplog: pytest.LogCaptureFixture) -> None:
    assert pick_device("auto", "--device", "--device cpu") == torch.device("cpu")
    assert caplog.messages == [f"--device: auto is the CPU, though a GPU is there: {WHY}"]
    with pytest.raises(ConfigError) as caught:
        pick_device("cuda")
    assert str(caught.value) == (
        f"run.device is cuda but 0 CUDA devices are visible. A GPU is there: {WHY}. "
        "To go without it: --options run.device=cpu"
    )


@pytest.mark.usefixtures("old_driver")
def test_a_card_and_a_pytorch_without_cuda(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert pick_device("auto") == torch.device("cpu")
    assert caplog.messages[0].endswith(
        "the NVIDIA driver is 535.183.01, but this PyTorch is built without CUDA"
    )


@pytest.mark.parametrize(("capability", "slow"), [((7, 5), True), ((8, 6), False)])
def test_bf16_on_an_older_card_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    slow: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for dtype in (torch.bfloat16, torch.float16):
        device.warn_of_emulation(torch.device("cuda"), dtype, "run.autocast_dtype")
    device.warn_of_emulation(torch.device("cpu"), torch.bfloat16, "run.autocast_dtype")
    assert [m.startswith("run.autocast_dtype is bf16") for m in caplog.messages] == [True] * slow
    device.is_ampere.cache_clear()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("", "expandable_segments:True"),
        ("PYTORCH_ALLOC_CONF", "x"),
        ("PYTORCH_CUDA_ALLOC_CONF", None),
    ],
)
def test_memory_grows_in_segments_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, name: str, wanted: str | None
) -> None:
    """Read when PyTorch is imported, or later: it must be there before the command begins."""
    monkeypatch.setattr("os.environ", {name: "x"} if name else {})
    found: list[str | None] = []
    _status(lambda: found.append(os.environ.get("PYTORCH_ALLOC_CONF")))
    assert found == [wanted]
