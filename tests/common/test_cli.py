"""What every command shares: errors without a traceback, devices."""

from __future__ import annotations

import sys

import pytest
import torch

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
