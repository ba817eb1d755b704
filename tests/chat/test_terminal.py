"""``cli_demo.py`` as a user has it: on a real pseudo-terminal, and in a pipe."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lavis.common.paths import TOYBOX
from tests.conftest import REPO

pexpect = pytest.importorskip("pexpect")

COMMAND = [str(REPO / "cli_demo.py"), "--cpu-only"]
LONG = ":conf do_sample=True temperature=5.0 seed=6 max_new_tokens=5000 max_window_size=500"
"""Answers of seconds: other seeds draw the end of a turn within a tenth of one."""
ASKS, ANSWERS = "\x1b[?2004h", "\x1b[?2004l"  # the line editor begins and ends bracketed paste
COLOURS = re.compile(r"\x1b\[(?:0;)?3[0-7]m")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r")


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PROMPT_TOOLKIT_NO_CPR": "1",
        **more,
    }


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, tmp_path: Path, *arguments: str, **env: str) -> None:
        self.shown = io.StringIO()
        self.child: Any = pexpect.spawn(
            sys.executable,
            [*COMMAND, *arguments],
            cwd=str(tmp_path),
            env=environment(tmp_path, **env),
            encoding="utf-8",
            timeout=90,
            dimensions=(40, 200),
        )
        self.child.logfile_read = self.shown
        self.greeting = self.wait_for("Ctrl-D leaves.")
        self.ready()

    def wait_for(self, text: str) -> str:
        """Read until a text comes; return what came before it."""
        self.child.expect_exact(text)
        return ESCAPES.sub("", self.child.before)

    def ready(self) -> str:
        """Read until the program asks for the next line; return what it said."""
        said = self.wait_for(ASKS)
        self.wait_for("User:")
        return said

    def enter(self, keys: str = "") -> str:
        """Finish a line; return what is said to it."""
        self.child.sendline(keys)
        self.wait_for(ANSWERS)
        return self.ready()


@pytest.fixture()
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    running = Terminal(tmp_path)
    yield running
    if running.child.isalive():
        running.child.kill(signal.SIGKILL)
        running.child.wait()


def test_every_command(terminal: Terminal, tmp_path: Path) -> None:
    shutil.copy(TOYBOX / "image" / "four.png", tmp_path / "four of them.png")
    send = terminal.enter
    assert "Talking to toybox about scene.png." in terminal.greeting
    assert COLOURS.search(terminal.shown.getvalue())
    for name in (":help", ":h"):
        said = send(name)
        for command in (":img", ":clear-his, :clh", ":conf [NAME=VALUE...]", ":save FILE"):
            assert command in said
    assert "Assistant: A big red circle at the top left" in send("Describe this image in detail.")
    assert "Assistant: 三个。" in send("图里有几个物体？")
    for name in (":history", ":his"):
        said = send(name)
        assert "[scene.png] Describe this image in detail." in said and "图里有几个物体？" in said
    assert "scene.png (question 1)" in send(":img")
    assert "error: nowhere.png cannot be read" in send(":img nowhere.png")
    assert "shows four of them.png besides" in send(":img 'four of them.png'")
    assert "four of them.png (with the next question)" in send(":img")
    assert "Assistant: " in send("图里有几个物体？")
    assert "taken back: 图里有几个物体？; the next question shows four of" in send(":undo")
    assert "三个。" in send(":his")
    assert "the next question shows the 2 images again" in send(":clear-his")
    assert "nothing was asked yet" in send(":retry")
    assert "Assistant: " in send("Hello.")
    assert "Assistant: " in send(":retry")
    assert "shows the 2 images again" in send(":clh")
    assert "a new conversation, with four of them.png" in send(":new 'four of them.png'")
    assert "Assistant: 四个。" in send("图里有几个物体？")
    assert "seed=1234" in send(":seed")
    assert "seed=7" in send(":seed 7")
    assert "error: seed: 'x' is no number" in send(":seed x")
    assert "top_p=1.0" in send(":conf")
    said = send(":conf temperature=0.7 top_k=5")
    assert "temperature=0.7" in said and "without effect unless do_sample=True" in said
    assert "did you mean 'temperature'" in send(":conf temprature=1")
    assert "temperature=1.0" in send(":reset-conf")
    said = send(":conf top_p=__import__('os').system('touch${IFS}hacked')")
    assert "is no number, True, False or None" in said and not (tmp_path / "hacked").exists()
    assert "saved to talk.json" in send(":save talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert saved["exchanges"][0]["answer"] == "四个。"
    assert "nowhere/talk.json cannot be written" in send(":save nowhere/talk.json")
    assert "unknown command :hlp; did you mean ':help'?" in send(":hlp")
    for name in (":clear", ":cl"):
        terminal.child.sendline(name)
        terminal.child.expect_exact("\x1b[2J")
        terminal.ready()
    terminal.child.sendline(":exit")
    terminal.child.expect(pexpect.EOF)
    terminal.child.wait()
    assert terminal.child.exitstatus == 0  # mistakes at a terminal are no failure


@pytest.fixture()
def bare_terminal(tmp_path: Path) -> Iterator[Terminal]:
    """Without colours, and without a place for the lines that were typed."""
    state = tmp_path / "no folder"
    state.touch()
    running = Terminal(tmp_path, XDG_STATE_HOME=str(state), NO_COLOR="1")
    yield running
    if running.child.isalive():
        running.child.kill(signal.SIGKILL)
        running.child.wait()
    assert not COLOURS.search(running.shown.getvalue())


def test_ctrl_c_stops_the_answer_and_not_the_program(bare_terminal: Terminal) -> None:
    terminal = bare_terminal
    terminal.enter(LONG)
    terminal.child.sendline("Describe this image in detail.")
    terminal.wait_for("Assistant: ")
    terminal.child.expect(".")  # it speaks
    terminal.child.sendintr()
    terminal.wait_for("(stopped)")
    terminal.ready()
    assert "(stopped)" in terminal.enter(":his")
    terminal.child.sendline("Describe this image in detail.")
    terminal.wait_for("Assistant: ")
    terminal.child.expect(".")
    terminal.child.sendintr()
    terminal.child.sendintr()  # impatient
    terminal.wait_for("(stopped)")
    terminal.ready()
    terminal.enter(":reset-conf")
    assert "taken back: Describe" in terminal.enter(":undo")
    assert "taken back: Describe" in terminal.enter(":undo")
    assert "Assistant: 三个。" in terminal.enter("图里有几个物体？")
    terminal.child.send("half a li")
    terminal.child.sendintr()  # at the prompt: begins a new line
    terminal.ready()
    assert "三个。" in terminal.enter(":his")
    terminal.child.sendeof()
    terminal.child.expect(pexpect.EOF)
    terminal.child.wait()
    assert terminal.child.exitstatus == 0


def test_completion_and_the_lines_before(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "unmistakable.png").write_bytes((TOYBOX / "image" / "four.png").read_bytes())
    terminal.child.send(":res\t")
    terminal.wait_for("et-conf")
    assert "max_new_tokens=512" in terminal.enter()
    terminal.child.send(":img unm\t")
    terminal.wait_for("istakable.png")
    assert "shows unmistakable.png besides those before" in terminal.enter()
    terminal.child.send(":conf temp\t")
    terminal.wait_for("erature=")
    assert "temperature=0.5" in terminal.enter("0.5")
    terminal.enter("图里有几个物体？")
    terminal.child.send("\x1b[A")  # the line before
    terminal.wait_for("图里有几个物体？")
    assert "Assistant: " in terminal.enter()
    history = tmp_path / "state" / "lavis" / "chat_history"
    assert "图里有几个物体？" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0


def piped(tmp_path: Path, lines: str | bytes, *arguments: str, **env: str) -> Any:
    return subprocess.run(
        [sys.executable, *COMMAND, *arguments],
        input=lines.encode() if isinstance(lines, str) else lines,
        capture_output=True,
        cwd=tmp_path,
        env=environment(tmp_path, **env),
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_from_a_pipe(tmp_path: Path, locale: str) -> None:
    done = piped(
        tmp_path,
        ":help\n图里有几个物体？\n\n:seed 3\n:conf top_p=0.9\n:undo\n:retry\n".encode()
        + b"\xd6\xd0?\nDescribe this image in detail.\n:his\n:img\n:clear\n:save talk.json\n"
        b":clh\n:exit\nlate\n",
        LC_ALL=locale,
        PYTHONCOERCECLOCALE="0",
        PYTHONUTF8="0",
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 1  # :retry, when nothing was asked
    assert "error: nothing was asked yet" in err
    assert "error: this line is not text in UTF-8" in err
    assert "Answering with the toybox" in err
    assert out.count("Assistant: 三个。\n") == 1
    assert "seed=3\n" in out and "top_p=0.9\n" in out
    assert out.count("Assistant: A big red circle") == 2  # and in the history
    assert "scene.png (question 1)" in out
    assert "\x1b" not in out and "User: 图里" not in out
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [e["question"] for e in saved["exchanges"]] == ["Describe this image in detail."]


def test_a_pipe_without_mistakes(tmp_path: Path) -> None:
    image = str(TOYBOX / "image" / "four.png")
    done = piped(tmp_path, "图里有几个物体？", "--image", image)
    assert (done.returncode, done.stdout.decode()) == (0, "Assistant: 四个。\n")


def test_ctrl_c_ends_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, *COMMAND]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment(tmp_path),
    ) as child:
        assert child.stdin and child.stdout and child.stderr
        child.stdin.write(f"Hello.\n{LONG}\nDescribe this image in detail.\n".encode())
        child.stdin.flush()
        while not child.stdout.readline().startswith(b"max_window_size="):
            pass
        assert child.stdout.read(12).startswith(b"Assistant: ")  # and it speaks
        child.send_signal(signal.SIGINT)
        child.stdout.read()
        assert b"Traceback" not in child.stderr.read()
    assert child.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "error: nowhere.png cannot be read"),
        (["--checkpoint", "nowhere.pth"], "error: no checkpoint nowhere.pth"),
        (["--model-type", "qwen7b_chat"], "error: --model-type needs --checkpoint"),
        (["--max-new-tokens", "0"], "max-new-tokens: must be an integer from 1 to"),
        (["--seed", "-3"], "--seed/-s: must be an integer from 0 to"),
        (["--llm_device_map", "gpu"], "invalid choice: 'gpu'"),
    ],
)
def test_mistakes_before_the_first_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = piped(tmp_path, "Hello.\n", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert done.stdout == b""
