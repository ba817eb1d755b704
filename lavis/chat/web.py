"""The web page: what its buttons do, and the server that answers them."""

from __future__ import annotations

import html
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
from starlette.middleware import Middleware

from lavis.chat.conversation import Answer
from lavis.chat.engine import ChatEngine
from lavis.chat.settings import ChatSettings
from lavis.chat.web_guard import MAX_FILE_BYTES, MAX_FILES, Guard, Uploads, client_of
from lavis.chat.web_page import CSS, EXAMPLES, SETTINGS, WHOLE, Page, chat_html, theme
from lavis.chat.web_sessions import Session, Sessions, history, strip
from lavis.chat.web_texts import TEXTS, accepted_language
from lavis.common.errors import ConfigError, DataError, LavisError
from lavis.common.images import open_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
MAX_BEAMS = 8
MAX_QUEUED = 64
_EVERY = 0.05  # seconds between two updates of a growing answer


class WebChat:
    """A page on which any number of visitors talk to one engine.

    Attributes:
        sessions: the visitors' conversations.
        uploads: files that have been sent and not yet been looked at.
        demo: Gradio's page.
    """

    def __init__(
        self,
        engine: ChatEngine,
        settings: ChatSettings | None = None,
        *,
        language: str = "auto",
        toybox: bool = False,
        max_sessions: int = 32,
    ) -> None:
        """Build the page.

        Args:
            settings: that the page begins with.
            language: ``zh``, ``en``, or ``auto`` for the browser's.
            toybox: whether to say that a tiny model answers.
            max_sessions: how many conversations are held; then the one idle longest goes.
        """
        self.settings = settings or ChatSettings()
        self.sessions = Sessions(engine, self.settings, max_sessions)
        self.uploads = Uploads()
        self._engine = engine
        self._language = language
        first = "en" if language == "auto" else language
        self.page = Page(self.settings, first, toybox=toybox)
        self.demo = self.page.demo
        with self.demo:
            self._connect()
        self.demo.queue(max_size=MAX_QUEUED, api_open=False, default_concurrency_limit=8)

    def launch(self, host: str, port: int, *, share: bool = False) -> str:
        """Serve the page; returns its address. Port 0 is one that is free.

        Raises:
            ConfigError: the address cannot be used.
        """
        # Read at every upload and cache write: nothing lands in a folder that others share.
        os.environ["GRADIO_TEMP_DIR"] = str(self.uploads.folder)
        if port == 0:
            with socket.create_server((host, 0)) as free:
                port = free.getsockname()[1]
        try:
            _, address, shared = self.demo.launch(
                server_name=host,
                server_port=port,
                share=share,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                max_file_size=MAX_FILE_BYTES,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                mcp_server=False,
                ssr_mode=False,
                pwa=False,
                inbrowser=False,
                theme=theme(),
                css=CSS,
                app_kwargs={
                    "middleware": [Middleware(Guard, uploads=self.uploads)],
                    "docs_url": None,
                    "redoc_url": None,
                    "openapi_url": None,
                },
            )
        except OSError as error:
            raise ConfigError(f"cannot serve on {host}:{port}: {error}") from error
        return str(shared or address)

    def wait(self) -> None:
        """Serve until Ctrl-C."""
        try:
            threading.Event().wait()
        finally:
            self.close()

    def close(self) -> None:
        """Stop serving; forget conversations and files."""
        self.sessions.close()
        self.demo.close(verbose=False)
        self.uploads.close()

    def _connect(self) -> None:
        page = self.page
        language, view = page.language, page.view
        values = [page.settings[name] for name in SETTINGS]
        quick = {"show_progress": "hidden", "api_visibility": "private"}
        answers: dict[str, Any] = {**quick, "concurrency_id": "answer", "concurrency_limit": 8}

        page.demo.load(self.load, None, [language, *page.worded], **quick)
        language.change(self.translate, [language], [*page.worded, *view], **quick)
        page.demo.unload(self.unload)

        page.add.upload(
            None,
            [page.add],
            [page.uploaded],
            js="files => JSON.stringify(files.map(f => f.path))",
            trigger_mode="multiple",
        ).then(self.show, [language, page.uploaded], view, trigger_mode="multiple", **quick)
        for button, name in zip(page.examples, EXAMPLES, strict=True):
            button.click(self._example(name), [language], view, **quick)
        page.discard.click(self.discard, [language], view, **quick)

        asked = [page.send.click, page.question.submit]
        inputs = [language, page.question, *values]
        gr.on(asked, self.ask, inputs, [page.question, *view], **answers).then(
            self.refresh, [language], view, **quick
        )
        page.retry.click(self.retry, [language, *values], view, **answers).then(
            self.refresh, [language], view, **quick
        )
        # Not in the queue: it must get through when the queue is full.
        page.stop.click(self.stop, None, None, queue=False, **quick)
        page.undo.click(self.undo, [language], [page.question, *view], **quick)
        page.clear.click(self.clear, [language], view, **quick)
        page.download.click(self.record, [language], [page.record], **quick).then(
            None, [page.record], None, js=_SAVE
        )

    def load(self, request: gr.Request) -> list[Any]:
        """The page in the visitor's language."""
        language = self._language
        if language == "auto":
            language = accepted_language(request.headers.get("accept-language", ""))
        return [language, *self.page.words(language)]

    def unload(self, request: gr.Request) -> None:
        """The tab is gone."""
        self.sessions.drop(request.session_hash)

    def translate(self, request: gr.Request, language: str) -> list[Any]:
        """The page in another language."""
        return [*self.page.words(language), *self.refresh(request, language)]

    def refresh(self, request: gr.Request, language: str) -> list[Any]:
        """The page as the conversation is now."""
        return self._view(self.sessions.find(request.session_hash), language)

    def show(self, request: gr.Request, language: str, uploaded: str) -> list[Any]:
        """Take what the visitor uploaded; nothing else is opened, whatever the name says."""
        session, texts = self._session(request, language), TEXTS[language]
        for token in _names(uploaded):
            taken = self.uploads.take(client_of(request), token)
            if taken is None:
                self._warn(texts["not_uploaded"], texts)
                continue
            path, name = taken
            try:
                self._show(session, path, name, texts)
            except DataError as error:
                self._warn(str(error), texts)
            finally:
                path.unlink(missing_ok=True)
        return self._view(session, language)

    def _show(self, session: Session, path: Any, name: str, texts: dict[str, str]) -> None:
        if len(session.conversation.waiting) >= MAX_FILES:
            raise DataError(texts["many_images"].format(limit=MAX_FILES))
        try:
            picture = open_image(path, formats=FORMATS, max_pixels=MAX_PIXELS)
        except DataError as error:  # its message has the server's path
            what = "many_pixels" if "too large" in str(error) else "unreadable"
            text = texts[what].format(name=name, limit=MAX_PIXELS // 10**6)
            raise DataError(text) from error
        session.show(self._engine.encode_image(picture, name), picture)

    def _example(self, name: str) -> Callable[..., list[Any]]:
        def pick(request: gr.Request, language: str) -> list[Any]:
            session = self._session(request, language)
            try:
                self._show(session, EXAMPLES[name], name, TEXTS[language])
            except DataError as error:
                self._warn(str(error), TEXTS[language])
            return self._view(session, language)

        return pick

    def discard(self, request: gr.Request, language: str) -> list[Any]:
        """Take waiting images off."""
        session = self._session(request, language)
        session.discard()
        return self._view(session, language)

    def ask(
        self, request: gr.Request, language: str, question: str, *values: Any
    ) -> Iterator[list[Any]]:
        """Ask; the answer grows on the page."""
        session = self._session(request, language)
        start = self._start(
            language, lambda **chosen: session.conversation.ask(question or "", **chosen), values
        )
        if start is None:
            yield [gr.skip(), *self._view(session, language)]
            return
        first = True
        for view in self._follow(session, start, language):
            yield ["" if first else gr.skip(), *view]
            first = False

    def retry(self, request: gr.Request, language: str, *values: Any) -> Iterator[list[Any]]:
        """Answer the last question again."""
        session = self._session(request, language)
        start = self._start(language, session.conversation.retry, values)
        if start is None:
            yield self._view(session, language)
        else:
            yield from self._follow(session, start, language)

    def _start(
        self, language: str, begin: Callable[..., Answer], values: tuple[Any, ...]
    ) -> Answer | None:
        """Begin an answer, or say why not."""
        texts = TEXTS[language]
        try:
            chosen = self._settings(values, texts)
            answer = begin(**chosen)
        except LavisError as error:
            self._warn(str(error), texts)
            return None
        names = self.settings.changed(**chosen).without_effect()
        if names:
            self._warn(texts["without_effect"].format(names=", ".join(names)), texts)
        if answer.dropped:
            gr.Info(html.escape(texts["unseen"]))
        return answer

    def _settings(self, values: tuple[Any, ...], texts: dict[str, str]) -> dict[str, Any]:
        chosen = dict(zip(SETTINGS, values, strict=True))
        for name in WHOLE:
            value = chosen[name]
            if isinstance(value, float):
                if not value.is_integer():
                    raise ConfigError(texts["not_whole"].format(name=name))
                chosen[name] = int(value)
        if isinstance(chosen["num_beams"], int) and chosen["num_beams"] > MAX_BEAMS:
            raise ConfigError(texts["many_beams"].format(limit=MAX_BEAMS))
        return chosen

    def _follow(self, session: Session, answer: Answer, language: str) -> Iterator[list[Any]]:
        """The page at every moment of an answer.

        Also the last one shows Stop: Send comes back when the event is over, for until then
        the browser would not send another question.
        """
        session.answer = answer
        try:
            yield self._view(session, language, answering=True)
            shown = time.monotonic()
            for _ in answer:
                if time.monotonic() - shown >= _EVERY:
                    yield self._view(session, language, answering=True)
                    shown = time.monotonic()
        except LavisError as error:
            self._warn(str(error), TEXTS[language])
        finally:  # also when nobody listens any more
            if not answer.finished:
                answer.cancel()
        yield self._view(session, language, answering=True)

    def stop(self, request: gr.Request) -> None:
        """End the answer that is being made."""
        session = self.sessions.find(request.session_hash)
        if session is not None:
            session.conversation.cancel()

    def undo(self, request: gr.Request, language: str) -> list[Any]:
        """Take the last question back into the text box."""
        session = self._session(request, language)
        try:
            text: Any = session.conversation.undo().text
        except LavisError as error:
            self._warn(str(error), TEXTS[language])
            text = gr.skip()
        return [text, *self._view(session, language)]

    def clear(self, request: gr.Request, language: str) -> list[Any]:
        """Forget the conversation."""
        session = self._session(request, language)
        session.close()
        return self._view(session, language)

    def record(self, request: gr.Request, language: str) -> str:
        """The conversation as JSON."""
        session = self._session(request, language)
        return json.dumps(session.conversation.to_dict(), ensure_ascii=False, indent=2)

    def _session(self, request: gr.Request, language: str) -> Session:
        session, lost = self.sessions.get(request.session_hash)
        if lost:
            self._warn(TEXTS[language]["forgotten"], TEXTS[language])
        return session

    def _view(
        self, session: Session | None, language: str, *, answering: bool = False
    ) -> list[Any]:
        texts = TEXTS[language]
        busy = answering or (session is not None and session.busy)
        waiting = session.conversation.waiting if session is not None else []
        return [
            history(session, texts, chat_html) if session is not None else [],
            strip(session, waiting, texts["waiting"]) if session is not None else "",
            gr.update(visible=bool(waiting)),
            gr.update(visible=not busy),
            gr.update(visible=busy),
        ]

    def _warn(self, message: str, texts: dict[str, str]) -> None:
        """Say it in a corner of the page, which would show HTML."""
        gr.Warning(html.escape(message), title=html.escape(texts["error"]))


_SAVE = """text => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "conversation.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""


def _names(uploaded: str) -> list[str]:
    try:
        names = json.loads(uploaded or "[]")
    except (ValueError, RecursionError):
        names = [uploaded]
    names = names if isinstance(names, list) else [names]
    return [name if isinstance(name, str) else "" for name in names[:MAX_FILES]]
