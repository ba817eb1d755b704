"""The conversations of a web server's visitors, and how a page shows one."""

from __future__ import annotations

import base64
import html
import io
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from PIL import Image

from lavis.chat.conversation import Answer, Conversation
from lavis.chat.engine import ChatEngine, ChatImage
from lavis.chat.settings import ChatSettings
from lavis.common.images import as_image

THUMBNAIL = 192  # pixels, longer side

# What a model says is text: its HTML is shown, not obeyed, and its pictures are not fetched.
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table")
_MARKDOWN.disable("image")


@dataclass
class Session:
    """A browser tab's conversation.

    Attributes:
        name: of the page that shows it.
        client: the browser's secret.
        language: that was chosen last; an event that was under way may still have the one before.
        thumbnails: of each image's number, as a ``data:`` address.
        values: of the settings at the latest question, as the page sent them.
        answer: the latest one.
        used: when it was used last, by :func:`time.monotonic`.
    """

    name: str
    client: str
    conversation: Conversation
    language: str = ""
    thumbnails: dict[int, str] = field(default_factory=dict)
    values: tuple[Any, ...] = ()
    answer: Answer | None = None
    used: float = field(default_factory=time.monotonic)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to lose."""
        return not (self.conversation.exchanges or self.conversation.waiting)

    @property
    def busy(self) -> bool:
        """Whether an answer is being made."""
        return self.answer is not None and not self.answer.finished

    def show(self, image: ChatImage, picture: Image.Image) -> None:
        """Show an encoded image with the next question."""
        self.thumbnails[image.number] = data_address(picture)
        self.conversation.show(image)

    def discard(self, number: int) -> None:
        """Take a waiting image off."""
        waiting = self.conversation.waiting
        if any(image.number == number for image in waiting):
            self.thumbnails.pop(number, None)
            self.conversation.waiting = [i for i in waiting if i.number != number]

    def close(self) -> None:
        """End an answer that is being made, and give the memory back."""
        self.conversation.clear()
        self.thumbnails.clear()
        self.answer = None


class Sessions:
    """Sessions by the name that a tab gives itself, of bounded number."""

    def __init__(self, engine: ChatEngine, settings: ChatSettings, limit: int = 32) -> None:
        """Hold at most ``limit``: then the one that was idle longest goes."""
        self._engine = engine
        self._settings = settings
        self._limit = limit
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, name: str) -> Session | None:
        """The session of this name, if there is one; using it keeps it."""
        with self._lock:
            session = self._sessions.get(name)
            if session is not None:
                session.used = time.monotonic()
            return session

    def get(self, name: str, client: str = "") -> Session:
        """The session of this name, made if need be for this browser."""
        with self._lock:
            gone: Session | None = None
            if name not in self._sessions:
                if len(self._sessions) >= self._limit:
                    idle = min(self._sessions.values(), key=lambda s: (s.busy, s.used))
                    gone = self._sessions.pop(idle.name)
                conversation = Conversation(self._engine, self._settings)
                self._sessions[name] = Session(name, client, conversation)
            session = self._sessions[name]
            session.used = time.monotonic()
        if gone is not None:  # outside the lock: it waits for the token that is being computed
            gone.close()
        return session

    def rename(self, old: str, new: str, client: str) -> Session | None:
        """Give a browser's session to the page that was loaded in place of an earlier one."""
        with self._lock:
            session = self._sessions.get(old)
            if session is None or not client or session.client != client:
                return None
            self._sessions[new] = self._sessions.pop(old)
            session.name = new
            session.used = time.monotonic()
        session.conversation.cancel()  # nobody listens to that answer any more
        return session

    def leave(self, name: str, grace: float) -> None:
        """A tab is gone or cut off: forget its session unless it is used again within ``grace``."""
        timer = threading.Timer(grace, self.drop, (name, time.monotonic()))
        timer.daemon = True
        timer.start()

    def drop(self, name: str, unused_since: float = math.inf) -> None:
        """Forget a session, if it was not used since then."""
        with self._lock:
            session = self._sessions.get(name)
            if session is None or session.used > unused_since:
                return
            del self._sessions[name]
        session.close()

    def close(self) -> None:
        """Forget all."""
        for name in list(self._sessions):
            self.drop(name)


def data_address(picture: Image.Image | Path) -> str:
    """A small copy as a ``data:`` address: what a page shows is never a file of the server."""
    small = as_image(picture)
    kind = "PNG" if max(small.size) <= THUMBNAIL else "JPEG"
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def strip(session: Session, images: Sequence[ChatImage], words: str, discard: str = "") -> str:
    """HTML that shows images in a row; ``discard`` labels a button that takes one off."""
    if not images:
        return ""
    pictures = []
    for image in images:
        name = html.escape(image.name)
        source = session.thumbnails.get(image.number, "")
        picture = f'<img src="{source}" alt="{name}" title="{name}">'
        if discard:
            label = html.escape(discard.format(name=image.name))
            picture += f'<button data-discard="{image.number}" title="{label}">×</button>'
        pictures.append(f"<figure>{picture}</figure>")
    label = f"<span>{html.escape(words)}</span>" if words else ""
    return f'<div class="strip">{label}{"".join(pictures)}</div>'


def history(
    session: Session, texts: dict[str, str], part: Callable[[str], Any]
) -> list[dict[str, Any]]:
    """A chatbot's messages; each part is HTML of ours, made a component by ``part(html)``."""
    messages: list[dict[str, Any]] = []

    def add(role: str, *parts: str) -> None:
        if any(parts):
            messages.append({"role": role, "content": [part(p) for p in parts if p]})

    endings = {"stop": "", "length": texts["cut"], "cancelled": texts["stopped"]}
    exchanges = list(session.conversation.exchanges)
    for i, exchange in enumerate(exchanges):
        if i and i == session.conversation.forgotten:
            add("assistant", _block("line", texts["unseen"]))
        add("user", strip(session, exchange.images, ""), _block("said plain", exchange.text))
        answer = _MARKDOWN.render(exchange.answer or "…")
        if session.busy and i == len(exchanges) - 1:
            add("assistant", f'<div class="said">{answer}</div>')
            continue
        copied, label = html.escape(exchange.answer), html.escape(texts["copy"])
        said = (
            f'<div class="said">{answer}</div>'
            f'<button class="copy" data-copy="{copied}">{label}</button>'
        )
        add("assistant", said * bool(exchange.answer), _block("remark", endings[exchange.finish]))
    return messages


def _block(kind: str, text: str) -> str:
    return f'<div class="{kind}">{html.escape(text)}</div>' if text else ""
