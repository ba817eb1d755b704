"""The web page: what its buttons do, and the server that answers them."""

from __future__ import annotations

import html
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lavis.chat.conversation import Answer
from lavis.chat.engine import ChatEngine
from lavis.chat.settings import ChatSettings
from lavis.chat.web.guard import MAX_FILES, Guard, Uploads, client_of
from lavis.chat.web.images import open_upload
from lavis.chat.web.server import direct, serve
from lavis.chat.web.sessions import Session, Sessions, history, strip
from lavis.chat.web.texts import TEXTS, VisitorError, language_of
from lavis.common.errors import ConfigError, DataError, WeightsError
from lavis.common.images import is_video
from lavis.common.videos import contact_sheet
from lavis.processors.conversation import IMAGE_PLACEHOLDER

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
with direct():
    import gradio as gr
    from starlette.middleware import Middleware

    from lavis.chat.web.page import EXAMPLES, SETTINGS, Page, chat_html, chosen_settings, looks

logger = logging.getLogger(__name__)

MAX_QUEUED = 64
GRACE = 60.0
"""Seconds in which a page that was loaded again gets its conversation back."""
_EVERY = 0.05  # seconds between two updates of a growing answer
# What the page's script may report of an upload.
_UPLOAD_ERRORS = ("many_images", "large_file", "large_upload", "no_cookie", "no_upload")


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
        grace: float = GRACE,
    ) -> None:
        """Build the page.

        Args:
            settings: that the page begins with.
            language: ``zh``, ``en``, or ``auto`` for the browser's.
            toybox: whether to say that a tiny model answers.
            max_sessions: how many conversations are held; then the one idle longest goes.
            grace: seconds for which a conversation is held when its page is gone.
        """
        self.settings = settings or ChatSettings()
        self.sessions = Sessions(engine, self.settings, max_sessions)
        self.uploads = Uploads()
        self._engine = engine
        self._language = language
        self._grace = grace
        first = "en" if language == "auto" else language
        self.page = Page(self.settings, first, toybox=toybox)
        self.demo = self.page.demo
        with self.demo:
            self._connect()
        self.demo.queue(max_size=MAX_QUEUED, api_open=False, default_concurrency_limit=8)

    def launch(self, host: str, port: int, *, share: bool = False, root_path: str = "") -> str:
        """Serve the page; arguments, result and errors as :func:`serve`."""
        guard = Middleware(Guard, uploads=self.uploads, language=self._language)
        # Read at every upload and cache write: nothing lands in a folder that others share.
        os.environ["GRADIO_TEMP_DIR"] = str(self.uploads.folder)
        return serve(self.demo, guard, host, port, share=share, root_path=root_path, **looks())

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
        shared = [language, page.held]
        values = [page.settings[name] for name in SETTINGS]
        hidden = {"show_progress": "hidden", "api_visibility": "private"}
        # Made one after another, so that no older view of a conversation comes after a newer one.
        quick: dict[str, Any] = {**hidden, "concurrency_id": "view", "concurrency_limit": 1}
        answers: dict[str, Any] = {**hidden, "concurrency_id": "answer", "concurrency_limit": 8}

        loaded = [language, *page.worded, page.question, *values, *view]
        kept = [page.sent, page.question]
        page.demo.load(self.load, kept, loaded, js="() => lavis.kept()", **quick)
        # Not `change`: the answer to `load` is in that language already, and a second answer to
        # come would undo what the visitor does in the meantime.
        chosen = "(language, held) => (lavis.choose(language), [language, held])"
        language.input(self.translate, shared, [*page.worded, *view], js=chosen, **quick)
        page.demo.unload(self.unload)

        handed = "(language, held) => [language, held, lavis.{}.shift()]"
        for button, act in ((page.show, self.show), (page.discard, self.discard)):
            button.click(
                act, [*shared, page.sent], view, js=handed.format(act.__name__),
                trigger_mode="multiple", **quick,
            )  # fmt: skip
        for button, name in zip(page.examples, EXAMPLES, strict=True):
            button.click(self._example(name), shared, view, **quick)

        asked = [page.send.click, page.question.submit]
        inputs = [*shared, page.question, *values]
        gr.on(asked, self.ask, inputs, [page.question, *view], **answers).then(
            self.refresh, shared, view, **quick
        )
        page.retry.click(self.retry, [*shared, *values], view, **answers).then(
            self.refresh, shared, view, **quick
        )
        # Not in the queue: it must get through when the queue is full.
        page.stop.click(self.stop, None, None, queue=False, **hidden)
        page.undo.click(self.undo, shared, [page.question, *view], **quick)
        page.clear.click(self.clear, shared, view, **quick)
        page.download.click(self.record, shared, [page.record], **quick).then(
            None, [page.record], None, js="lavis.save"
        )

    def load(self, request: gr.Request, held: str, question: str) -> list[Any]:
        """The page in the visitor's language, with what an earlier page of its tab kept."""
        language = language_of(request, self._language)
        words = [language, *self.page.words(language), question or gr.skip()]
        session = self.sessions.rename(held, request.session_hash, client_of(request))
        if session is None and held:
            self._tell(VisitorError("forgotten"), language)
        if session is None:
            return [*words, *[gr.skip()] * (len(SETTINGS) + len(self.page.view))]
        session.language = language
        values = session.values or [gr.skip()] * len(SETTINGS)
        return [*words, *values, *self._view(session)]

    def unload(self, request: gr.Request) -> None:
        """The tab is gone."""
        self.sessions.leave(request.session_hash, self._grace)

    def translate(self, request: gr.Request, language: str, held: str) -> list[Any]:
        """The page in another language."""
        session = self.sessions.find(request.session_hash)
        if session is not None:
            session.language = language
        return [*self.page.words(language), *self.refresh(request, language, held)]

    def refresh(self, request: gr.Request, language: str, held: str) -> list[Any]:
        """The page as the conversation is now."""
        session = self.sessions.find(request.session_hash)
        if session is None and held:
            self._tell(VisitorError("forgotten"), language)
        return self._view(session)

    def show(self, request: gr.Request, language: str, held: str, uploaded: str) -> list[Any]:
        """Take what the visitor uploaded; nothing else is opened, whatever the name says."""
        session, _ = self._session(request, language, held)
        names = _handed(uploaded)
        if isinstance(names, str) and names in _UPLOAD_ERRORS:
            self._tell(VisitorError(names), language)
            return self._view(session)
        for token in names[:MAX_FILES] if isinstance(names, list) else [names]:
            taken = self.uploads.take(client_of(request), token if isinstance(token, str) else "")
            if taken is None:
                self._tell(VisitorError("not_uploaded"), language)
                continue
            self._show(session, *taken)
            taken[0].unlink(missing_ok=True)
        return self._view(session)

    def _show(self, session: Session, path: Path, name: str) -> None:
        try:
            if len(session.conversation.waiting) >= MAX_FILES:
                raise VisitorError("many_images")
            pictures = open_upload(path, name, self._engine.video)
            if is_video(path):
                shown = self._engine.encode_frames(pictures, name)
            else:
                shown = self._engine.encode_image(pictures[0], name)
            session.show(shown, contact_sheet(pictures))
        except Exception as error:  # noqa: BLE001 -- told, and logged where it is ours
            self._tell(error, session.language)

    def _example(self, name: str) -> Callable[..., list[Any]]:
        def pick(request: gr.Request, language: str, held: str) -> list[Any]:
            session, _ = self._session(request, language, held)
            self._show(session, EXAMPLES[name], name)
            return self._view(session)

        return pick

    def discard(self, request: gr.Request, language: str, held: str, number: str) -> list[Any]:
        """Take a waiting image off."""
        session, _ = self._session(request, language, held)
        session.discard(_handed(number))
        return self._view(session)

    def ask(
        self, request: gr.Request, language: str, held: str, question: str | None, *values: Any
    ) -> Iterator[list[Any]]:
        """Ask, or answer the last question again if there is none; the answer grows on the page.

        A question about what is forgotten is not asked.
        """
        lost = "forgotten" if question is None else "not_sent"
        session, known = self._session(request, language, held, lost)
        answer = self._start(session, question, values) if known else None
        if answer is None:
            yield [gr.skip(), *self._view(session)]
            return
        box: Any = ""  # emptied once: the visitor may type the next question meanwhile
        for view in self._follow(session, answer):
            yield [box, *view]
            box = gr.skip()

    def retry(
        self, request: gr.Request, language: str, held: str, *values: Any
    ) -> Iterator[list[Any]]:
        """Answer the last question again."""
        for _, *view in self.ask(request, language, held, None, *values):
            yield view

    def _start(
        self, session: Session, question: str | None, values: tuple[Any, ...]
    ) -> Answer | None:
        """Begin to answer a question, or the last one again, or say why not."""
        conversation = session.conversation
        chosen: dict[str, Any] = {}
        try:
            chosen = chosen_settings(values)
            if question is None:
                if not conversation.exchanges:
                    raise VisitorError("nothing_asked")
                answer = conversation.retry(**chosen)
            else:
                if not question.strip():
                    raise VisitorError("empty_question")
                answer = conversation.ask(question, **chosen)
        except DataError:
            named = (question or "").count(IMAGE_PLACEHOLDER)
            number = len(conversation.waiting)
            self._tell(VisitorError("placeholders", named=named, number=number), session.language)
        except ConfigError:
            limit, context = chosen["max_new_tokens"], self._engine.model.context
            room = max(min(conversation.settings.max_window_size, context - limit), 0)
            window = VisitorError("window", context=context, answer=limit, room=room)
            self._tell(window, session.language)
        except Exception as error:  # noqa: BLE001 -- told, and logged where it is ours
            self._tell(error, session.language)
        else:
            session.values = values
            if names := self.settings.changed(**chosen).without_effect():
                self._tell(VisitorError("without_effect", names=", ".join(names)), session.language)
            if answer.dropped:
                gr.Info(html.escape(TEXTS[session.language]["unseen"]))
            return answer
        return None

    def _follow(self, session: Session, answer: Answer) -> Iterator[list[Any]]:
        """The page at every moment of an answer.

        Also the last one shows Stop: Send comes back when the event is over, for until then
        the browser would not send another question.
        """
        session.answer = answer
        try:
            yield self._view(session, answering=True)
            shown = time.monotonic()
            for _ in answer:
                if time.monotonic() - shown >= _EVERY:
                    yield self._view(session, answering=True)
                    shown = time.monotonic()
        except Exception as error:  # noqa: BLE001 -- told, and logged where it is ours
            self._tell(error, session.language)
        finally:  # also when nobody listens any more
            if not answer.finished:
                answer.cancel()
        yield self._view(session, answering=True)

    def stop(self, request: gr.Request) -> None:
        """End the answer that is being made."""
        session = self.sessions.find(request.session_hash)
        if session is not None:
            session.conversation.cancel()

    def undo(self, request: gr.Request, language: str, held: str) -> list[Any]:
        """Take the last question back into the text box."""
        session, known = self._session(request, language, held)
        text: Any = gr.skip()
        if session.conversation.exchanges:
            text = session.conversation.undo().text
        elif known:
            self._tell(VisitorError("nothing_asked"), language)
        return [text, *self._view(session)]

    def clear(self, request: gr.Request, language: str, held: str) -> list[Any]:
        """Forget the conversation."""
        session, _ = self._session(request, language, held)
        session.close()
        return self._view(session)

    def record(self, request: gr.Request, language: str, held: str) -> str:
        """The conversation as JSON; "" if it is forgotten."""
        session, known = self._session(request, language, held)
        if not known:
            return ""
        record = session.conversation.to_dict()
        del record["settings"]  # those that the page began with; each answer has its own
        return json.dumps(record, ensure_ascii=False, indent=2)

    def _session(
        self, request: gr.Request, language: str, held: str, lost: str = "forgotten"
    ) -> tuple[Session, bool]:
        """The visitor's session, and whether it is the one whose conversation the page shows."""
        known = not held or self.sessions.find(request.session_hash) is not None
        if not known:  # the server was started again, or it was idle longest of too many
            self._tell(VisitorError(lost), language)
        session = self.sessions.get(request.session_hash, client_of(request))
        session.language = session.language or language
        return session, known

    def _view(self, session: Session | None, *, answering: bool = False) -> list[Any]:
        if session is None:
            return [[], "", gr.update(visible=True), gr.update(visible=False), ""]
        texts = TEXTS[session.language]
        busy = answering or session.busy
        waiting = session.conversation.waiting
        return [
            history(session, texts, chat_html),
            strip(session, waiting, texts["waiting"], texts["discard"]),
            gr.update(visible=not busy),
            gr.update(visible=busy),
            "" if session.empty else session.name,
        ]

    def _tell(self, error: Exception, language: str) -> None:
        """Say it in a corner of the page, which would show HTML, in the visitor's language."""
        if not isinstance(error, VisitorError):
            logger.error("an answer or an image failed", exc_info=error)
            key = "broken_model" if isinstance(error, WeightsError) else "server_error"
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            error = VisitorError("no_memory" if memory else key)
        title = html.escape(TEXTS[language]["error"])
        gr.Warning(html.escape(error.text(language)), title=title)


def _handed(text: str) -> Any:
    """What the page's script handed over as JSON."""
    try:
        return json.loads(text or "[]")
    except (ValueError, RecursionError):
        return text
