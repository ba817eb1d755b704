"""Commands and questions, line by line."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lavis.chat import ChatEngine, ChatSettings
from lavis.chat.repl import COMMANDS, Leave, Repl, printable
from lavis.common.cli import TOYBOX

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
        waiting = iter(lines)

        def read(waiting: Any = waiting) -> str:
            line: str | None = next(waiting, None)
            if line is None:
                raise EOFError
            return line

        assert Session(toybox, interactive=interactive).repl.run(read) == status


def test_exit(say: Session) -> None:
    for name in (":exit", ":quit", ":q"):
        with pytest.raises(Leave):
            say(name)


def test_an_interrupted_answer(toybox: ChatEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for interactive in (True, False):
        session = Session(toybox, interactive=interactive)
        session("Hello.")
        layer = toybox.model.llm_model.model.layers[2]
        calls = []

        def interrupt(*_: Any, calls: Any = calls) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        hook = layer.register_forward_pre_hook(interrupt)
        if interactive:
            done, out, err = session("Describe this image in detail.")
            assert done and out.startswith("Assistant: ") and "(stopped)" in err
        else:
            with pytest.raises(KeyboardInterrupt):
                session("Describe this image in detail.")
        hook.remove()
        assert session("图里有几个物体？")[0]


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
    path.write_text("old")
    assert say(f":save '{path}'")[0]
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved == say.repl.conversation.to_dict()
    assert "三个。" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_saving_keeps_links_and_takes_any_image_name(say: Session, tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"\xd6\xd0.png")  # a name in GBK
    image.write_bytes(Path(SCENE).read_bytes())
    assert say(f":new\t'{image}'")[0]
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
