"""Models to talk to, and the web page with the toybox: a browser tab without a browser."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lavis.chat import Answer, ChatEngine
from lavis.common.paths import REPOSITORY, TOYBOX
from tests.conftest import TOY

PICTURES = TOYBOX / "image"


@pytest.fixture(scope="session")
def toybox() -> ChatEngine:
    """The embedded model."""
    from lavis.models import load_model_and_preprocess

    model, processors, _ = load_model_and_preprocess(
        "minigpt4qwen", "toybox", is_eval=True, options=[f"env.cache_root={REPOSITORY}"]
    )
    model.load_checkpoint(TOYBOX / "checkpoint.pth")
    return ChatEngine(model, processors["eval"])


@pytest.fixture(scope="session")
def fixture(toy_yaml: Any) -> ChatEngine:
    """Random weights, whose answers are whatever: what one reads changes all that follows."""
    from lavis.models import load_model_and_preprocess

    model, processors, _ = load_model_and_preprocess(
        "minigpt4qwen", "qwen7b_chat", is_eval=True, cfg_path=toy_yaml
    )
    model.load_checkpoint(TOY / "checkpoint_9.pth")
    return ChatEngine(model, processors["eval"])


@pytest.fixture(params=["toybox", "fixture"])
def engine(request: pytest.FixtureRequest) -> ChatEngine:
    """Either."""
    return request.getfixturevalue(request.param)


class Pictures:
    """Pictures as tensors, by the images that were made of them."""

    def __init__(self, engine: ChatEngine) -> None:
        self.engine = engine
        self._pixels: dict[int, Tensor] = {}

    def __call__(self, name: str) -> Any:
        """Encode one of the toybox's pictures."""
        pixels = self.engine._processor(Image.open(TOYBOX / "image" / f"{name}.png").convert("RGB"))
        image = self.engine.encode_image(pixels, name)
        self._pixels[image.number] = pixels
        return image

    def cold(self, answer: Answer, prompt: list[int], **settings: Any) -> list[int]:
        """The answer's ids when everything is computed anew, by ``generate_ids``."""
        pixels = [self._pixels[image.number] for image in answer.images]
        stack = torch.stack(pixels) if pixels else None
        return self.engine.model.generate_ids([prompt], stack, **settings)[0]


@pytest.fixture()
def pictures(engine: ChatEngine) -> Pictures:
    """Pictures to show."""
    return Pictures(engine)


@pytest.fixture(scope="module")
def web(toybox: Any) -> Iterator[Any]:
    """A running page; ``web.address`` is where."""
    pytest.importorskip("gradio", reason="needs the extra `web`")
    from lavis.chat import ChatSettings
    from lavis.chat.web.app import WebChat

    page = WebChat(toybox, ChatSettings(max_new_tokens=64, seed=1234), toybox=True, grace=0)
    page.address = page.launch("127.0.0.1", 0)
    yield page
    page.close()


@pytest.fixture()
def gate(toybox: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Answers get one token for each ``release()``, and are shown at once."""
    tokens = threading.Semaphore(0)
    extend = toybox.extend

    def wait_and_extend(*args: Any) -> Any:
        assert tokens.acquire(timeout=60)
        return extend(*args)

    monkeypatch.setattr(toybox, "extend", wait_and_extend)
    monkeypatch.setattr("lavis.chat.web.app._EVERY", 0)
    yield tokens
    tokens.release(10_000)


@pytest.fixture()
def rows(toybox: ChatEngine) -> Iterator[list[int]]:
    """How many tokens each pass of the language model computes."""
    seen: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"].shape[1])

    base = toybox.model.language.base
    hook = base.register_forward_pre_hook(count, with_kwargs=True)
    yield seen
    hook.remove()


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
        self.http = httpx.Client(base_url=web.address, timeout=60, trust_env=False)
        self.http.get("/")
        self.session = secrets.token_hex(6)
        self.held = ""
        self.language = "en"

    @property
    def conversation(self) -> Any:
        return self.web.sessions.find(self.session).conversation

    def upload(self, *files: Path | tuple[str, bytes]) -> Any:
        pairs = [(f.name, f.read_bytes()) if isinstance(f, Path) else f for f in files]
        return self.http.post("gradio_api/upload", files=[("files", pair) for pair in pairs])

    def show(self, *files: Path | tuple[str, bytes]) -> list[dict[str, Any]]:
        names = self.upload(*files).json()
        return self.call("show", json.dumps(names))

    def post(self, name: str, *data: Any, path: str = "gradio_api/queue/join") -> Any:
        """Fire an event, with what the page sends along with most."""
        index = next(i for i, fn in self.web.demo.fns.items() if fn.name == name)
        shared = [] if name in ("load", "stop") else [self.language, self.held]
        body = {"data": [*shared, *data], "fn_index": index, "session_hash": self.session}
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
        if name in ("ask", "retry"):  # what an answer's last message has is the difference
            self.call("refresh")
        elif name != "record" and messages[-2]["success"]:
            held = messages[-2]["output"]["data"][-1]
            self.held = held if isinstance(held, str) else self.held
        return messages

    def ask(self, question: str, each: Any = None, **settings: Any) -> list[Any]:
        return self.call("ask", question, *chosen(**settings), each=each)

    def stop(self) -> None:
        self.post("stop", path="gradio_api/run/predict").raise_for_status()


def chosen(**settings: Any) -> list[Any]:
    """The settings in the page's order."""
    from lavis.chat import ChatSettings
    from lavis.chat.web.page import SETTINGS

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
