"""Commands and questions, line by line."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis.chat import ChatEngine, ChatSettings
from lavis.chat.terminal.repl import COMMANDS, Leave, Repl
from lavis.common.cli import printable
from lavis.common.paths import TOYBOX

SCENE = str(TOYBOX / "image" / "scene.png")


class Session:
    """A REPL, and what it said to each line."""

    def __init__(self, engine: ChatEngine, *, interactive: bool = False) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.repl = Repl(
            engine,
            ChatSettings(max_new_tokens=40, seed=1),
            interactive=interactive,
            out=self.out,
            err=self.err,
        )

    def __call__(self, line: str) -> tuple[bool, str, str]:
        for stream in (self.out, self.err):
            stream.seek(0)
            stream.truncate()
        done = self.repl.line(line)
        return done, self.out.getvalue(), self.err.getvalue()

    def run(self, *lines: str) -> str:
        """The whole program; what it printed."""
        waiting = iter(lines)

        def read() -> str:
            line = next(waiting, None)
            if line is None:
                raise EOFError
            return line

        self.status = self.repl.run(read)
        return self.out.getvalue()


@pytest.fixture()
def say(toybox: ChatEngine) -> Session:
    session = Session(toybox)
    session.repl.show([SCENE])
    return session


def test_the_help_has_every_command(say: Session) -> None:
    done, out, _ = say(":help")
    assert done
    for command in COMMANDS:
        assert all(name in out for name in command.names)
        assert command.help in out


def test_a_mistake_says_so_and_loses_nothing(say: Session) -> None:
    say("图里有几个物体？")
    before = say.repl.conversation.to_dict()
    for line, message in [
        (":img nowhere.png", "nowhere.png cannot be read"),
        (f":img {SCENE} nowhere.png", "nowhere.png cannot be read"),
        (":new nowhere.png", "nowhere.png cannot be read"),
        (":img 'a", ":img 'a: no closing quotation"),
        (":sed 3", "unknown command :sed; did you mean ':seed'?"),
        (":clh now", ":clh takes no arguments"),
        (":conf top_p", "top_p: write name=value"),
        (":conf top_p=2", "generation setting top_p must be more than 0 and at most 1, not 2"),
        (":conf top_p=abc", "top_p: 'abc' is no number, True, False or None"),
        (":conf top_p=[1", "top_p: '[1' is no number, True, False or None"),
        (":conf top_p=0.5 top_k=-1", "generation setting top_k must be 0"),
        (":seed 1 2", ":seed takes one number"),
        (":save", ":save takes one file name"),
        (f":save {TOYBOX}", f"{TOYBOX} cannot be written"),
        (":save nul\0.json", "cannot be written"),
        (":save /dev/null", "/dev/null cannot be written: this is not a file"),
        (":save ~nobody-of-this-name/a.json", "~nobody-of-this-name/a.json: there is no such user"),
        (":img ~nobody-of-this-name/a.png", "~nobody-of-this-name/a.png: there is no such user"),
        (":conf top_p={[]:1}", "top_p: '{[]:1}' is no number, True, False or None"),
        (":seed\tx", "seed: 'x' is no number"),
        (":conf self=1", "unknown generation setting 'self'"),
        (":save /", "/ cannot be written"),
        ("<ImageHere> twice", "the question names 1 images"),
        ("a " * 9000, "the question and the images take"),
    ]:
        done, out, err = say(line)
        assert not done
        assert f"error: {message}" in err or message in err, (line, err)
        assert out == ""
        assert say.repl.conversation.to_dict() == before
    assert not list(TOYBOX.parent.glob(".*.tmp"))


def test_the_exit_status(toybox: ChatEngine) -> None:
    for interactive, lines, status in [
        (False, [":seed"], 0),
        (False, [":nothing", ":seed"], 1),
        (True, [":nothing"], 0),
        (False, [":seed", ":q", ":nothing"], 0),
    ]:
        session = Session(toybox, interactive=interactive)
        session.run(*lines)
        assert session.status == status


def test_exit(say: Session) -> None:
    for name in (":exit", ":quit", ":q"):
        with pytest.raises(Leave):
            say(name)


def at_call(module: Any, number: int, act: Callable[[], None]) -> Any:
    """Do something in the middle of a forward pass; returns the hook."""
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            act()

    return module.register_forward_pre_hook(hook)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def lost_ctrl_c() -> None:
    """Python drops an exception of a destructor."""

    class Destroyed:
        def __del__(self) -> None:
            press_ctrl_c()

    Destroyed()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("press", [press_ctrl_c, lost_ctrl_c])
def test_ctrl_c_stops_an_answer(toybox: ChatEngine, press: Callable[[], None]) -> None:
    session = Session(toybox, interactive=True)
    hook = at_call(toybox.model.language.model.model.layers[2], 3, press)
    said = session.run("Describe this image in detail.", "图里有几个物体？")
    hook.remove()
    first, second = session.repl.conversation.exchanges
    assert (first.finish, second.finish) == ("cancelled", "stop")
    assert said.count("Assistant: ") == 2 and session.err.getvalue() == "(stopped)\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_no_harm(toybox: ChatEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a third: from the first on, whenever something is said."""
    session = Session(toybox, interactive=True)
    pressed = []

    def press() -> None:
        pressed.append(1)
        press_ctrl_c()

    for stream in (session.out, session.err):

        def write(text: str, write: Any = stream.write) -> int:
            if pressed:
                press()
            return write(text)

        monkeypatch.setattr(stream, "write", write)
    hook = at_call(toybox.model.language.model.model.layers[2], 3, press)
    session.run("Describe this image in detail.", ":seed", ":undo")
    hook.remove()
    assert len(pressed) == 5
    assert session.out.getvalue().startswith("Assistant: ")
    assert session.out.getvalue().endswith("\nseed=1\n")
    assert session.err.getvalue() == "(stopped)\ntaken back: Describe this image in detail.\n"


def test_ctrl_c_while_an_image_is_encoded(say: Session, toybox: ChatEngine) -> None:
    say("图里有几个物体？")
    before = say.repl.conversation.to_dict()
    say.repl.interactive = True
    for line in (f":img {SCENE}", f":new {SCENE}"):
        hook = at_call(toybox.model.vision.visual_encoder, 1, press_ctrl_c)
        say.run(line)
        hook.remove()
        assert say.err.getvalue().endswith("(stopped)\n")
        assert say.repl.conversation.to_dict() == before
        assert not say.repl.conversation.waiting


def test_ctrl_c_ends_a_pipe(toybox: ChatEngine) -> None:
    session = Session(toybox)
    hook = at_call(toybox.model.language.model.model.layers[2], 3, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        session.run("Hello.")
    hook.remove()


def test_memory_that_runs_out_ends_no_conversation(say: Session, toybox: ChatEngine) -> None:
    say("图里有几个物体？")

    def fail() -> None:
        raise torch.OutOfMemoryError

    hook = at_call(toybox.model.language.model.model.layers[2], 1, fail)
    done, out, err = say("Hello.")
    hook.remove()
    assert (done, out) == (False, "Assistant: \n") and err.startswith("error: out of memory")
    say(":undo")
    assert say("图里有几个物体？")[1] == "Assistant: 三个。\n"


def test_what_the_window_dropped_is_told(say: Session) -> None:
    say(":conf max_window_size=120 max_new_tokens=8")
    told = [say("图里有几个物体？")[2] for _ in range(8)]
    assert sum("no longer fit into the window of 120 tokens" in err for err in told) >= 1
    assert "(the model does not see the" in say(":his")[2]


def test_a_cut_answer_is_told(say: Session) -> None:
    say(":conf max_new_tokens=2")
    _, out, err = say("Describe this image in detail.")
    assert out == "Assistant: A big\n"
    assert "(cut at max_new_tokens=2)" in err


def test_a_saved_conversation(say: Session, tmp_path: Path) -> None:
    say("图里有几个物体？")
    path = tmp_path / "a talk.json"
    path.touch()
    assert say(f":save '{path}'")[0]
    say("Hello.")
    assert say(f":save '{path}'")[0]  # over what it wrote before
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved == say.repl.conversation.to_dict()
    assert "三个。" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [b"old", b"\x89PNG\r\n", b"[]", b"3", b'{"system": "a", "exchanges": []}', b"[" * 100_000],
    ids=["text", "picture", "list", "number", "json", "nested"],
)
def test_no_other_file_is_written_over(say: Session, tmp_path: Path, content: bytes) -> None:
    say("图里有几个物体？")
    (path := tmp_path / "a").write_bytes(content)
    (link := tmp_path / "link").symlink_to(path)
    for name in (path, link):
        done, _, err = say(f":save {name}")
        assert not done and path.read_bytes() == content
        assert err == f"error: {name} is no saved conversation; :save! FILE writes over it\n"
    assert say(f":save! {link}") == (True, "", f"saved to {link}\n")
    assert json.loads(path.read_text(encoding="utf-8")) == say.repl.conversation.to_dict()
    assert link.is_symlink()


def test_a_question_may_begin_with_a_colon(say: Session) -> None:
    for line, question in [("::) hello", ":) hello"), ("::help", ":help"), (":::", "::")]:
        assert say(line)[0]
        assert say.repl.conversation.exchanges[-1].text == question
    asked = len(say.repl.conversation.exchanges)
    done, _, err = say(":) hello")
    assert not done and len(say.repl.conversation.exchanges) == asked
    escape = "'::' begins a question that begins with a colon"
    assert err == f"error: unknown command :); :help has all, and {escape}\n"
    assert say(":help")[1].endswith(f"\nAnything else is a question; {escape}.\n")


def test_saving_keeps_links_and_takes_any_image_name(say: Session, tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"\xd6\xd0.png")  # a name in GBK
    image.write_bytes(Path(SCENE).read_bytes())
    assert say(":new")[0]
    say.repl.show([str(image)])
    assert say("图里有几个物体？")[0]
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    assert say(f":save {link}")[0]
    assert link.is_symlink()
    saved = json.loads(target.read_text(encoding="utf-8"))
    assert saved["exchanges"][0]["images"] == [image.name]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\x9bc\td\n中文") == "a�[31mb��c\td\n中文"


def test_no_colours_where_nobody_looks(say: Session) -> None:
    assert "\x1b" not in "".join(str(part) for part in say("Hello."))
    assert say(":clear") == (True, "", "")
