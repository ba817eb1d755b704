"""The conversations of a web server's visitors, and how a page shows one."""

from __future__ import annotations

import base64
import html
import io
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from PIL import Image

from lavis.chat.conversation import Answer, Conversation, Exchange
from lavis.chat.engine import ChatEngine, ChatImage
from lavis.chat.settings import ChatSettings
from lavis.common.images import as_image

THUMBNAIL = 192  # pixels, longer side


class Session:
    """A browser tab's conversation.

    Attributes:
        thumbnails: of each image's number, as a ``data:`` address.
        answer: the latest one.
        used: when it was used last, by :func:`time.monotonic`.
    """

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.thumbnails: dict[int, str] = {}
        self.answer: Answer | None = None
        self.used = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether an answer is being made."""
        return self.answer is not None and not self.answer.finished

    def show(self, image: ChatImage, picture: Image.Image) -> None:
        """Show an encoded image with the next question."""
        self.thumbnails[image.number] = data_address(picture)
        self.conversation.show(image)

    def discard(self) -> None:
        """Take waiting images off."""
        for image in self.conversation.waiting:
            self.thumbnails.pop(image.number, None)
        self.conversation.waiting = []

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
        self._lost: deque[str] = deque(maxlen=1000)
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

    def get(self, name: str) -> tuple[Session, bool]:
        """The session of this name, made if need be; and whether an earlier one was lost."""
        with self._lock:
            gone: Session | None = None
            lost = name in self._lost
            if name not in self._sessions:
                if lost:
                    self._lost.remove(name)
                if len(self._sessions) >= self._limit:
                    gone = self._evict()
                self._sessions[name] = Session(Conversation(self._engine, self._settings))
            session = self._sessions[name]
            session.used = time.monotonic()
        if gone is not None:  # outside the lock: it waits for the token that is being computed
            gone.close()
        return session, lost

    def _evict(self) -> Session:
        name = min(self._sessions, key=lambda n: (self._sessions[n].busy, self._sessions[n].used))
        self._lost.append(name)
        return self._sessions.pop(name)

    def drop(self, name: str) -> None:
        """Forget a session: its tab is gone, or has been cut off and will be told."""
        with self._lock:
            session = self._sessions.pop(name, None)
            if session is not None:
                self._lost.append(name)
        if session is not None:
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


def strip(session: Session, images: list[ChatImage] | tuple[ChatImage, ...], words: str) -> str:
    """HTML that shows images in a row."""
    if not images:
        return ""
    pictures = "".join(
        f'<img src="{session.thumbnails.get(i.number, "")}" alt="{html.escape(i.name)}" '
        f'title="{html.escape(i.name)}">'
        for i in images
    )
    label = f"<span>{html.escape(words)}</span>" if words else ""
    return f'<div class="strip">{label}{pictures}</div>'


def history(session: Session, texts: dict[str, str], html_content: Any) -> list[dict[str, Any]]:
    """A chatbot's messages: text as text, images and remarks through ``html_content(html)``."""

    def said(text: str) -> dict[str, str]:
        # Gradio's chatbot shows HTML even with render_markdown=False; it only removes scripts.
        return {"type": "text", "text": html.escape(text)}

    messages: list[dict[str, Any]] = []

    def add(role: str, *content: Any) -> None:
        messages.append({"role": role, "content": list(content)})

    conversation = session.conversation
    exchanges = list(conversation.exchanges)
    for i, exchange in enumerate(exchanges):
        if i and i == conversation.forgotten:
            add("assistant", html_content(_remark(texts["unseen"], "line")))
        shown = strip(session, exchange.images, "")
        pictures = [html_content(shown)] if shown else []
        add("user", *pictures, said(exchange.text))
        coming = session.busy and i == len(exchanges) - 1
        answer = exchange.answer or ("…" if coming else "")
        content: list[Any] = [said(answer)] if answer else []
        remark = "" if coming else _ending(exchange, texts)
        if remark:
            content.append(html_content(_remark(remark, "remark")))
        if content:
            add("assistant", *content)
    return messages


def _ending(exchange: Exchange, texts: dict[str, str]) -> str:
    return {"stop": "", "length": texts["cut"], "cancelled": texts["stopped"]}[exchange.finish]


def _remark(text: str, kind: str) -> str:
    return f'<div class="{kind}">{html.escape(text)}</div>'
