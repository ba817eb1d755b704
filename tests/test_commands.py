"""The commands at the top of the repository, as a user calls them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import test_model_chat
import train
from lavis.common.errors import DataError, LavisError, WeightsError
from tests.conftest import DEMO, REPO, TOY

IMAGE = str(DEMO / "image" / "red_square.png")
CHECKPOINT = str(TOY / "checkpoint_9.pth")
CONFIG = ["--cfg-path", str(DEMO / "train.yaml")]


def run(monkeypatch: pytest.MonkeyPatch, command: Any, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [command.__name__, *CONFIG, *arguments])
    monkeypatch.chdir(REPO)
    return command.main()


def ask(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    return run(monkeypatch, test_model_chat, "--device", "cpu", "--max-new-tokens", "3", *arguments)


def test_two_questions_about_an_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = ask(
        monkeypatch, "--checkpoint", CHECKPOINT, "--image", IMAGE,
        "--question", "What?", "--second-question", "Why?",
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert lines[0] == "User: <Img><ImageHere></Img> What?"
    assert lines[1].startswith("Assistant: ")
    assert "User: Why?" in lines


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            ("--checkpoint", CHECKPOINT, "--image", "none.png"),
            DataError,
            "none.png cannot be read: ",
        ),
        (
            ("--checkpoint", CHECKPOINT, "--image", str(DEMO)),
            DataError,
            f"{DEMO} cannot be read: ",
        ),
        (("--checkpoint", "none.pth", "--image", IMAGE), WeightsError, "no checkpoint none.pth"),
        (
            ("--checkpoint", CHECKPOINT, "--image", IMAGE, "--question", "<ImageHere><ImageHere>"),
            DataError,
            "the question names 2 images (<ImageHere>), but 1 are new in it",
        ),
    ],
)
def test_mistakes_in_a_question(
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    kind: type[LavisError],
    message: str,
) -> None:
    with pytest.raises(kind) as caught:
        ask(monkeypatch, *arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("command", [train, test_model_chat])
def test_unknown_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: Any
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, command, "--no-such-flag")
    assert caught.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_a_wrong_path_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError) as caught:
        run(monkeypatch, train, "--options", "model.vit_weights=none.pth")
    assert str(caught.value).startswith(
        f"model.vit_weights: no file {Path(REPO) / 'none.pth'} (the nearest existing folder is "
    )
