"""What every command shares: errors without a traceback, devices."""

from __future__ import annotations

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


@pytest.mark.parametrize("status", [0, 7])
def test_status(status: int) -> None:
    assert _status(lambda: status) == status


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "", "cuda:x"])
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
        "run.device is cuda:2 but 2 CUDA devices are visible. On a machine without a GPU: "
        "--options run.device=cpu"
    )


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
