"""What Tab offers."""

from __future__ import annotations

from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from lavis.chat.terminal.screen import ChatCompleter


def completed(line: str) -> list[str]:
    """The line after each completion."""
    found = ChatCompleter().get_completions(Document(line), CompleteEvent())
    return [line[: len(line) + c.start_position] + c.text for c in found]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a cat.png", "it's.png", "dog.png", "图.png"):
        (tmp_path / name).touch()
    (tmp_path / "two words").mkdir()
    (tmp_path / "two words" / "inner.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (":his", [":history", ":his"]),
        (":reset", [":reset-conf"]),
        ("what is :his", []),
        ("dog", []),
        (":undo do", []),
        (":img do", [":img dog.png"]),
        (":new dog.png 图", [":new dog.png 图.png"]),
        (":save ~/do", [":save ~/dog.png"]),
        (":img a", [":img 'a cat.png'"]),
        (":img 'a c", [":img 'a cat.png'"]),
        (':img dog.png "a ', [":img dog.png 'a cat.png'"]),
        (":img a\\ c", [":img 'a cat.png'"]),
        (":img it", [""":img 'it'"'"'s.png'"""]),
        (":img two", [":img 'two words'"]),
        (":img 'two words'/", [":img 'two words/inner.png'"]),
        (":img 'two words/", [":img 'two words/inner.png'"]),
        (":conf temp", [":conf temperature="]),
        (":conf seed=1 top", [":conf seed=1 top_p=", ":conf seed=1 top_k="]),
    ],
)
def test_completion(line: str, expected: list[str]) -> None:
    assert completed(line) == expected


def test_commands_come_with_their_meaning() -> None:
    (found,) = ChatCompleter().get_completions(Document(":und"), CompleteEvent())
    assert found.display_meta_text == "take the last question and its answer back"


def test_a_new_word_offers_every_file() -> None:
    assert len(completed(":img dog.png ")) == len(completed(":img ")) == 5
