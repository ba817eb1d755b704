"""Prompts -> answers, computed here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from lavis.chat.cache import ConversationCache
from lavis.chat.conversation import Answer, Conversation, Exchange
from lavis.chat.engine import ChatEngine
from lavis.chat.server.prompts import Limits, Prompts
from lavis.chat.server.protocol import ChatBody, Finish
from lavis.chat.settings import ChatSettings


@dataclass(frozen=True)
class Begun:
    """The prompt is understood.

    Attributes:
        prompt_tokens: its length.
        cached_tokens: how many of them had been computed before.
    """

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Ended:
    """The answer is complete."""

    finish: Finish
    completion_tokens: int


Event = Begun | str | Ended
"""What happens while a request is answered, in this order; a ``str`` is a piece of the answer."""


class Backend(Protocol):
    """Makes answers."""

    def answer(self, body: ChatBody, stopped: Callable[[], bool]) -> Iterator[Event]:
        """Answer a request, as far as it is read.

        Args:
            stopped: whether nobody wants the rest; then it ends without :class:`Ended`.

        Raises:
            ApiError: the request cannot be answered.
        """
        ...


class Answers:
    """Answers that the engine computes."""

    def __init__(self, engine: ChatEngine, limits: Limits, defaults: ChatSettings) -> None:
        """As :class:`Prompts`."""
        self._engine = engine
        self._prompts = Prompts(engine, limits, defaults)
        self._caches = Caches(engine, limits.conversations)

    def answer(self, body: ChatBody, stopped: Callable[[], bool]) -> Iterator[Event]:
        """As :meth:`Backend.answer`."""
        prompt = self._prompts(body)
        cache = self._caches.take(self._engine.content(prompt.ids, prompt.images))
        try:
            talk = Conversation(self._engine, prompt.settings, cache=cache)
            answer = Answer(talk, Exchange(""), prompt.ids, prompt.images, prompt.settings, 0)
            yield Begun(len(prompt.ids), answer.reused)
            text = UntilStop(body.stops)
            while not text.ended and not stopped() and (piece := next(answer, None)) is not None:
                yield from text.push(piece)
            if stopped():
                return
            yield from text.rest()
            finish = answer.exchange.finish
            cut = finish == "length" and not text.ended
        finally:
            self._caches.put(cache)
        # Only now: who has the end may ask on at once, and shall find the cache.
        yield Ended("length" if cut else "stop", len(answer.ids))


class Caches:
    """Keys and values of requests that were answered, each for the next one that begins alike."""

    def __init__(self, engine: ChatEngine, limit: int) -> None:
        """Keep at most ``limit``, those used last; the engine limits their memory."""
        self._engine, self._limit = engine, limit
        self._free: list[ConversationCache] = []  # the latest last
        self._lock = threading.Lock()

    def take(self, content: list[int]) -> ConversationCache:
        """The one that has most in common with ``content``, for the caller alone until it is put.

        Where a prompt only begins as a longer one did, by its system prompt or its picture, that
        is copied: the other conversation goes on, too.
        """
        with self._lock:
            common = [cache.common(content) for cache in self._free]
            if not any(common):
                return ConversationCache()
            best = self._free[common.index(max(common))]
            if 2 * max(common) >= len(best.content):
                self._free.remove(best)
                return best
        return self._engine.branch(best, content)

    def put(self, cache: ConversationCache) -> None:
        """Keep it for the next request."""
        with self._lock:
            self._free.append(cache)
            del self._free[: -self._limit]


class UntilStop:
    """The text of an answer up to a stop string, which is not part of it.

    Attributes:
        ended: whether one was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.ended = False
        self._stops = stops
        self._held = ""  # may be the beginning of a stop string

    def push(self, piece: str) -> Iterator[str]:
        """Add a piece; gives what can be shown by now, if anything."""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.ended = bool(found)
        end = min(found, default=len(text) - self._beginning(text))
        self._held = "" if found else text[end:]
        if end:
            yield text[:end]

    def rest(self) -> Iterator[str]:
        """What was held back when no more is to come."""
        if self._held:
            yield self._held

    def _beginning(self, text: str) -> int:
        """How many of the last characters may begin a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(s.startswith(text[-n:]) for s in self._stops)), 0)
