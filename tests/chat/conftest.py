"""The web page with the toybox, on a free port; a browser tab without a browser."""

from __future__ import annotations

import argparse
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import REPO

PICTURES = REPO / "examples" / "toybox" / "image"


@pytest.fixture(scope="session")
def toybox_engine() -> Any:
    from lavis.chat.command import add_chat_arguments, load_chat

    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    return load_chat(parser.parse_args(["--cpu-only"]))[0]


@pytest.fixture(scope="module")
def web(toybox_engine: Any) -> Iterator[Any]:
    """A running page; ``web.address`` is where."""
    pytest.importorskip("gradio", reason="needs the extra `web`")
    from lavis.chat import ChatSettings
    from lavis.chat.web import WebChat

    page = WebChat(toybox_engine, ChatSettings(max_new_tokens=64, seed=1234), toybox=True)
    page.address = page.launch("127.0.0.1", 0)
    yield page
    page.close()


@pytest.fixture()
def gate(toybox_engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Answers get one token for each ``release()``, and are shown at once."""
    tokens = threading.Semaphore(0)
    extend = toybox_engine.extend

    def wait_and_extend(*args: Any) -> Any:
        assert tokens.acquire(timeout=60)
        return extend(*args)

    monkeypatch.setattr(toybox_engine, "extend", wait_and_extend)
    monkeypatch.setattr("lavis.chat.web._EVERY", 0)
    yield tokens
    tokens.release(10_000)


@pytest.fixture(scope="session")
def huge_png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 million pixels in a few kilobytes."""
    path = tmp_path_factory.mktemp("huge") / "huge.png"
    Image.new("1", (10_000, 10_000)).save(path)
    return path


class Tab:
    """What a browser tab sends and receives."""

    def __init__(self, web: Any) -> None:
        import httpx

        self.web = web
        self.http = httpx.Client(base_url=web.address, timeout=60)
        self.http.get("/")
        self.session = secrets.token_hex(6)

    @property
    def conversation(self) -> Any:
        return self.web.sessions.find(self.session).conversation

    def upload(self, *files: Path | tuple[str, bytes]) -> Any:
        pairs = [(f.name, f.read_bytes()) if isinstance(f, Path) else f for f in files]
        return self.http.post("gradio_api/upload", files=[("files", pair) for pair in pairs])

    def show(self, *files: Path | tuple[str, bytes]) -> list[dict[str, Any]]:
        names = self.upload(*files).json()
        return self.call("show", "en", json.dumps(names))

    def post(self, name: str, *data: Any, path: str = "gradio_api/queue/join") -> Any:
        index = next(i for i, fn in self.web.demo.fns.items() if fn.name == name)
        body = {"data": list(data), "fn_index": index, "session_hash": self.session}
        return self.http.post(path, json=body)

    def call(self, name: str, *data: Any, each: Callable[[Any], None] | None = None) -> list[Any]:
        """Fire an event; the server's messages about it."""
        self.post(name, *data).raise_for_status()
        messages = []
        url = f"gradio_api/queue/data?session_hash={self.session}"
        with self.http.stream("GET", url) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    messages.append(json.loads(line[5:]))
                    if each is not None:
                        each(messages[-1])
                    if messages[-1]["msg"] == "close_stream":
                        break
        return messages

    def ask(self, question: str, each: Any = None, **settings: Any) -> list[Any]:
        return self.call("ask", "en", question, *chosen(**settings), each=each)

    def stop(self) -> None:
        self.post("stop", path="gradio_api/run/predict").raise_for_status()


def chosen(**settings: Any) -> list[Any]:
    """The settings in the page's order."""
    from lavis.chat import ChatSettings
    from lavis.chat.web_page import SETTINGS

    values = ChatSettings(max_new_tokens=64, seed=1234)
    return [settings.get(name, getattr(values, name)) for name in SETTINGS]


def warnings(messages: list[Any]) -> str:
    """What a corner of the page says."""
    return "\n".join(m["log"] for m in messages if m["msg"] == "log")


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
