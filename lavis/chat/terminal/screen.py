"""Line editing for the chat on a terminal, with Prompt Toolkit."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from lavis.chat.terminal.repl import COMMANDS, setting_names

_TAKES_PATHS = (":img", ":new", ":save", ":save!")
_WORD = re.compile(r"""(?:[^\s'"\\]|\\.|\\$|'[^']*(?:'|$)|"(?:[^"\\]|\\.)*\\?(?:"|$))+""")


class ChatCompleter(Completer):
    """Commands at the beginning of a line, paths and settings after them."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """What the text before the cursor may become."""
        line = document.text_before_cursor.lstrip()
        if not line.startswith(":"):
            return
        command, *rest = line.split(maxsplit=1)
        if not rest and not line[-1].isspace():
            for known in COMMANDS:
                for name in known.names:
                    if name.startswith(command):
                        yield Completion(name, -len(command), display_meta=known.help)
        elif command in _TAKES_PATHS:
            written, word = _unfinished(*rest)
            for found in self._paths.get_completions(Document(word), complete_event):
                path = _quoted(word + found.text)
                yield Completion(path, -len(written), display=found.display)
        elif command == ":conf":
            word = re.split(r"\s", line)[-1]
            for name in setting_names():
                if name.startswith(word):
                    yield Completion(f"{name}=", -len(word))


def terminal_reader() -> Callable[[], str]:
    """Lines that a user types, with editing, history and completion."""
    colour = not os.environ.get("NO_COLOR")
    prompt = ANSI("\033[32mUser: \033[0m" if colour else "User: ")
    session: PromptSession[str] = PromptSession(
        history=_history(),
        completer=ChatCompleter(),
        complete_while_typing=False,
        enable_suspend=True,
    )
    return lambda: session.prompt(prompt)


def _unfinished(text: str = "") -> tuple[str, str]:
    """The last of a shell's words, as it is written so far and as it is meant."""
    written = ""
    for match in _WORD.finditer(text):
        written = match[0] if match.end() == len(text) else ""
    for end in ("", '"', "'"):
        try:
            return written, "".join(shlex.split(written + end))
        except ValueError:  # a quote is open
            continue
    return written, written


def _quoted(path: str) -> str:
    """A path as it is written in a line, with quotes only where it needs them."""
    try:
        return path if shlex.split(path) == [path] else shlex.quote(path)
    except ValueError:
        return shlex.quote(path)


def _history() -> History:
    """Earlier lines, of earlier runs too where they can be kept."""
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
        path = state / "lavis" / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.open("ab").close()
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return _TolerantHistory(path)


class _TolerantHistory(FileHistory):
    """A full disk must not end the conversation."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)
