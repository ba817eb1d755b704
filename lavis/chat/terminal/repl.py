"""Chat on a terminal or from a pipe: a line is a question or a command."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lavis.chat.terminal.interrupt import CtrlC
from lavis.common.cli import printable
from lavis.common.errors import ConfigError, DataError, LavisError, raised_as
from lavis.common.paths import replaces
from lavis.common.registry import did_you_mean

if TYPE_CHECKING:
    from lavis.chat.conversation import Answer
    from lavis.chat.engine import ChatEngine, ChatImage
    from lavis.chat.settings import ChatSettings

_COLON = "'::' begins a question that begins with a colon"
_USER, _MODEL, _NOTE, _ERROR, _PLAIN = "\033[32m", "\033[36m", "\033[2m", "\033[31m", "\033[0m"


@dataclass(frozen=True)
class Command:
    """A line that begins with a colon.

    Attributes:
        names: the first one is shown, all are understood.
        arguments: as the help shows them.
        help: a line.
        run: gets the REPL and the words after the name.
    """

    names: tuple[str, ...]
    arguments: str
    help: str
    run: Callable[[Repl, list[str]], None]


class Leave(Exception):  # noqa: N818 - not an error
    """``:exit``."""


class Repl:
    """One conversation, and the commands around it."""

    def __init__(
        self,
        engine: ChatEngine,
        settings: ChatSettings,
        *,
        interactive: bool,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            interactive: somebody sits in front of it: Ctrl-C stops an answer and not the program,
                and a line that fails does not make the program fail.
            out: for answers, standard output by default.
            err: for errors and remarks, standard error by default.
        """
        from lavis.chat.conversation import Conversation

        self.conversation = Conversation(engine, settings)
        self.interactive = interactive
        self._ctrl_c = CtrlC(self.conversation.cancel)
        self._defaults = settings
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._colours = interactive and not os.environ.get("NO_COLOR")

    def run(self, read: Callable[[], str]) -> int:
        """Read lines until the end of input or ``:exit``.

        Args:
            read: gives a line, or raises ``EOFError``, or ``KeyboardInterrupt`` to begin a new one.

        Returns:
            The exit status: 1 if nobody sits in front of it and a line failed.
        """
        with self._ctrl_c.installed() if self.interactive else nullcontext():
            failed = False
            while True:
                try:
                    failed |= not self.line(read())
                except (EOFError, Leave):
                    return int(failed and not self.interactive)
                except KeyboardInterrupt:  # at the prompt
                    if not self.interactive:
                        raise

    def line(self, line: str) -> bool:
        """Do what a line says; whether it could be done. Errors are told, not raised.

        Raises:
            Leave: the user wants to go.
        """
        import torch

        line = line.strip()
        try:
            if any("\ud800" <= c <= "\udfff" for c in line):
                raise DataError("this line is not text in UTF-8")
            if line.startswith(":") and not line.startswith("::"):
                self._command(line)
            elif line:
                self._answer(self.conversation.ask(line[line.startswith("::") :]))
        except LavisError as error:
            self._error(str(error))
            return False
        except (MemoryError, torch.OutOfMemoryError):
            self._error("out of memory; :clh, a smaller max_window_size or fewer num_beams help")
            return False
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.conversation.cancel()
            self._note("(stopped)")
        return True

    def show(self, paths: Sequence[str]) -> None:
        """Show images with the next question.

        Raises:
            DataError: a file is missing or no image; then none is shown.
        """
        new = self.conversation.show(*self._encode(paths))
        later = " besides those before" if len(new) < len(self.conversation.images) else ""
        names = ", ".join(image.name for image in new)
        self._note(f"the next question shows {names}{later}")

    def _command(self, line: str) -> None:
        name, *rest = line.split(maxsplit=1)
        command = _BY_NAME.get(name)
        if command is None:
            near = did_you_mean(name, _BY_NAME)
            raise DataError(f"unknown command {name}{near}; :help has all, and {_COLON}")
        try:
            words = shlex.split(rest[0]) if rest else []
        except ValueError as error:
            raise DataError(f"{line}: {str(error).lower()}") from error
        if words and not command.arguments:
            raise DataError(f"{name} takes no arguments")
        command.run(self, words)

    def _answer(self, answer: Answer) -> None:
        if answer.dropped:
            settings, context = self.conversation.settings, self.conversation.engine.model.context
            window = min(settings.max_window_size, context - settings.max_new_tokens)
            self._note(
                f"the oldest {_number(answer.dropped, 'turn')} no longer fit into the window of "
                f"{window} tokens; the model does not see them any more, only their images"
            )
        self._write(self._out, "Assistant: ", _MODEL)
        try:
            with self._ctrl_c:
                for piece in answer:
                    self._write(self._out, piece)
            if answer.exchange.finish == "cancelled":
                raise KeyboardInterrupt  # it was lost
        finally:
            self._write(self._out, "\n")
        if answer.exchange.finish == "length":
            self._note(f"(cut at max_new_tokens={len(answer.ids)})")

    def _encode(self, paths: Sequence[str]) -> list[ChatImage]:
        with self._ctrl_c:
            return [self.conversation.engine.encode_image(_path(path)) for path in paths]

    def _help(self, words: list[str]) -> None:
        lines = [(f"{', '.join(c.names)} {c.arguments}".rstrip(), c.help) for c in COMMANDS]
        width = max(len(left) for left, _ in lines)
        text = "\n".join(f"{left:{width}}  {right}" for left, right in lines)
        self._write(self._out, f"{text}\nAnything else is a question; {_COLON}.\n")

    def _leave(self, words: list[str]) -> None:
        raise Leave

    def _clear_screen(self, words: list[str]) -> None:
        if self._out.isatty():
            self._out.write("\033[2J\033[3J\033[H")
            self._out.flush()

    def _forget(self, words: list[str]) -> None:
        self.conversation.clear_history()
        number = _number(len(self.conversation.images), "image")
        again = f"; the next question shows the {number} again" * bool(self.conversation.images)
        self._note(f"forgotten{again}")

    def _history(self, words: list[str]) -> None:
        for i, exchange in enumerate(self.conversation.exchanges):
            if i == self.conversation.forgotten > 0:
                self._note(f"(the model does not see the {_number(i, 'turn')} above)")
            images = "".join(f"[{image.name}] " for image in exchange.images)
            self._write(self._out, "User: ", _USER)
            self._write(self._out, f"{images}{exchange.text}\n")
            self._write(self._out, "Assistant: ", _MODEL)
            stopped = " (stopped)" * (exchange.finish == "cancelled")
            self._write(self._out, f"{exchange.answer}{stopped}\n")

    def _seed(self, words: list[str]) -> None:
        if len(words) > 1:
            raise DataError(":seed takes one number")
        self._change([f"seed={word}" for word in words])
        self._write(self._out, f"seed={self.conversation.settings.seed}\n")

    def _conf(self, words: list[str]) -> None:
        self._change(words)
        settings = dataclasses.asdict(self.conversation.settings)
        for name in (w.partition("=")[0] for w in words) if words else settings:
            self._write(self._out, f"{name}={settings[name]}\n")

    def _change(self, words: list[str]) -> None:
        values = {}
        for word in words:
            name, equals, text = word.partition("=")
            if not equals:
                raise ConfigError(f"{word}: write name=value, such as temperature=0.7")
            try:
                values[name] = ast.literal_eval(text)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
                raise ConfigError(f"{name}: {text!r} is no number, True, False or None") from error
        changed = self.conversation.settings.changed(**values)
        self.conversation.settings = changed
        if idle := [name for name in changed.without_effect() if name in values]:
            self._note(f"{', '.join(idle)}: without effect unless do_sample=True")

    def _reset_conf(self, words: list[str]) -> None:
        self.conversation.settings = self._defaults
        self._conf([])

    def _images(self, words: list[str]) -> None:
        if words:
            self.show(words)
            return
        for i, exchange in enumerate(self.conversation.exchanges, start=1):
            for image in exchange.images:
                self._write(self._out, f"{image.name} (question {i})\n")
        for image in self.conversation.waiting:
            self._write(self._out, f"{image.name} (with the next question)\n")
        if not self.conversation.images:
            self._note("no images; :img PATH shows one")

    def _new(self, words: list[str]) -> None:
        images = self._encode(words)  # before anything is forgotten
        self.conversation.clear()
        self.conversation.show(*images)
        self._note(
            "a new conversation" + f", with {', '.join(i.name for i in images)}" * bool(images)
        )

    def _undo(self, words: list[str]) -> None:
        taken = self.conversation.undo()
        images = ", ".join(image.name for image in taken.images)
        again = f"; the next question shows {images} again" * bool(images)
        self._note(f"taken back: {taken.text}{again}")

    def _retry(self, words: list[str]) -> None:
        self._answer(self.conversation.retry())

    def _save(self, words: list[str]) -> None:
        if len(words) == 1 and _is_foreign(path := _path(words[0])):
            raise DataError(f"{path} is no saved conversation; :save! FILE writes over it")
        self._save_over(words)

    def _save_over(self, words: list[str]) -> None:
        if len(words) != 1:
            raise DataError(":save takes one file name")
        path = _path(words[0])
        text = json.dumps(self.conversation.to_dict(), ensure_ascii=False, indent=2)
        with raised_as(DataError, f"{path} cannot be written", OSError, ValueError, RuntimeError):
            write_whole(path, f"{text}\n")
        self._note(f"saved to {path}")

    def _error(self, text: str) -> None:
        self._write(self._err, f"error: {text}\n", _ERROR)

    def _note(self, text: str) -> None:
        self._write(self._err, f"{text}\n", _NOTE)

    def _write(self, stream: TextIO, text: str, colour: str = "") -> None:
        text = printable(text)
        coloured = colour and self._colours and stream.isatty()
        stream.write(f"{colour}{text}{_PLAIN}" if coloured else text)
        stream.flush()


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _path(word: str) -> Path:
    try:
        return Path(word).expanduser()
    except RuntimeError as error:
        raise DataError(f"{word}: there is no such user") from error


def _is_foreign(path: Path) -> bool:
    """Whether a file would be lost that ``:save`` has not written."""
    try:
        text = path.read_bytes() if path.is_file() else b""
        return bool(text) and json.loads(text).keys() != {"system", "settings", "exchanges"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return True


def write_whole(path: Path, text: str) -> None:
    """Write a file wholly or not at all; a link to it stays a link.

    Raises:
        OSError, ValueError, RuntimeError: it cannot be written, or something else than a file is
            there, such as a folder or a device.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise ValueError("this is not a file")
    # Names that are no text become JSON escapes.
    with (
        replaces(target) as temporary,
        temporary.open("x", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(text)


COMMANDS = (
    Command((":help", ":h"), "", "this text", Repl._help),
    Command((":exit", ":quit", ":q"), "", "leave (or Ctrl-D)", Repl._leave),
    Command(
        (":img",),
        "[PATH...]",
        "show more images or videos with the next question; list them",
        Repl._images,
    ),
    Command((":new",), "[PATH...]", "begin a new conversation, with these images", Repl._new),
    Command((":history", ":his"), "", "what was said", Repl._history),
    Command((":clear-his", ":clh"), "", "forget what was said, keep the images", Repl._forget),
    Command((":undo",), "", "take the last question and its answer back", Repl._undo),
    Command((":retry",), "", "answer the last question again", Repl._retry),
    Command((":save",), "FILE", "write the conversation as JSON", Repl._save),
    Command((":save!",), "FILE", "the same, over any file", Repl._save_over),
    Command((":conf",), "[NAME=VALUE...]", "show or change generation settings", Repl._conf),
    Command((":reset-conf",), "", "the settings of the beginning", Repl._reset_conf),
    Command((":seed",), "[N]", "show or set the seed that answers are drawn with", Repl._seed),
    Command((":clear", ":cl"), "", "clear the screen", Repl._clear_screen),
)
_BY_NAME: dict[str, Command] = {name: c for c in COMMANDS for name in c.names}


def setting_names() -> list[str]:
    """What ``:conf`` knows."""
    from lavis.chat.settings import ChatSettings

    return [field.name for field in dataclasses.fields(ChatSettings)]


def pipe_reader(stream: TextIO) -> Callable[[], str]:
    """Lines of a pipe or a file, in UTF-8 whatever the locale says."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8-sig", errors="surrogateescape")

    def read() -> str:
        line = stream.readline()
        if not line:
            raise EOFError
        return line

    return read
