"""Line editing for the chat on a terminal, with Prompt Toolkit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from lavis.chat.repl import COMMANDS, setting_names

_TAKES_PATHS = (":img", ":new", ":save")


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
        command, blank, rest = line.partition(" ")
        word = rest.rpartition(" ")[2]
        if not blank:
            for known in COMMANDS:
                for name in known.names:
                    if name.startswith(command):
                        yield Completion(name, -len(command), display_meta=known.help)
        elif command in _TAKES_PATHS:
            yield from self._paths.get_completions(Document(word), complete_event)
        elif command == ":conf":
            for name in setting_names():
                if name.startswith(word):
                    yield Completion(f"{name}=", -len(word))


def terminal_reader() -> Callable[[], str]:
    """Lines that a user types, with editing, history and completion."""
    colour = not os.environ.get("NO_COLOR")
    prompt = ANSI("\033[32mUser: \033[0m" if colour else "User: ")
    session: PromptSession[str] = PromptSession(
        history=_history(), completer=ChatCompleter(), complete_while_typing=False
    )
    return lambda: session.prompt(prompt)


def _history() -> History:
    """Earlier lines, of earlier runs too where they can be kept."""
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    path = state / "lavis" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)
