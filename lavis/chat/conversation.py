"""A conversation: its images, its turns, and the keys and values computed for them."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lavis.chat.cache import ConversationCache
from lavis.chat.engine import ChatEngine, ChatImage, TokenChooser
from lavis.chat.settings import ChatSettings
from lavis.chat.text import TextStream
from lavis.common.errors import DataError, WeightsError
from lavis.models.generation import fit_window
from lavis.processors.conversation import place_images

FREE_AFTER_OVERFLOW = 0.25
"""Share of the window that is left free when turns are dropped, so that the prompt is computed
anew once in many turns and not at each."""

Finish = Literal["stop", "length", "cancelled"]


@dataclass
class Exchange:
    """A question and its answer.

    Attributes:
        text: what the user said.
        images: what the user showed with it.
        answer: so far, without white space at its ends.
        finish: ``stop`` if the model ended the answer, ``length`` if ``max_new_tokens`` did,
            ``cancelled`` if it is not complete.
        settings: that the answer was made with; drawn with ``None`` as seed, the one it took.
    """

    text: str
    images: tuple[ChatImage, ...] = ()
    answer: str = ""
    finish: Finish = "cancelled"
    settings: ChatSettings | None = None

    @property
    def question(self) -> str:
        """The text with its images in place."""
        return place_images(self.text, [image.places for image in self.images])


class Conversation:
    """Questions about images, each answered at the cost of its own tokens.

    A question's prompt is always the canonical text of the conversation. The keys and values that
    it has in common with what was computed before are kept, the rest is rolled back: undoing,
    editing, cancelling and forgetting need nothing else, and every answer is the one that a cold
    start on the same text gives.

    Attributes:
        exchanges: questions and answers, oldest first.
        waiting: images that the next question shows.
        settings: for the following questions.
        forgotten: how many of the oldest exchanges the model no longer sees.
    """

    def __init__(
        self,
        engine: ChatEngine,
        settings: ChatSettings | None = None,
        *,
        system: str | None = None,
        cache: ConversationCache | None = None,
    ) -> None:
        """Begin one; ``cache`` may hold keys and values of another text."""
        self.settings = settings or ChatSettings()
        self.exchanges: list[Exchange] = []
        self.waiting: list[ChatImage] = []
        self.forgotten = 0
        self.system = engine.model.encoder.system if system is None else system
        self.engine = engine
        self._encoder = dataclasses.replace(engine.model.encoder, system=self.system)
        self._cache = ConversationCache() if cache is None else cache
        self._lock = threading.RLock()
        self._answer: weakref.ref[Answer] | None = None

    @property
    def images(self) -> list[ChatImage]:
        """All images, in the order in which they were shown."""
        return [i for e in self.exchanges for i in e.images] + self.waiting

    def show(self, *images: object) -> list[ChatImage]:
        """Show images or videos with the next question: encoded, or what ``encode_image`` takes.

        Raises:
            DataError: one is missing or no image; then none of them is shown.
        """
        new = [
            image if isinstance(image, ChatImage) else self.engine.encode_image(image)
            for image in images
        ]
        with self._lock:
            self.waiting += new
        return new

    def ask(self, text: str, **settings: Any) -> Answer:
        """Ask a question; iterate over the answer to have it made.

        An answer that is still being made is cancelled.

        Args:
            text: special tokens in it are ordinary characters. ``<ImageHere>`` stands for a
                waiting image; without it they stand in front.
            settings: other values of :class:`ChatSettings` for this answer.

        Raises:
            DataError: the question is empty, or names another number of images than wait.
            ConfigError: a setting does not fit, or question and images pass the window.
        """
        with self._lock:
            self.cancel()
            return self._ask(self.exchanges, self.waiting, text, settings)

    def edit(self, index: int, text: str, **settings: Any) -> Answer:
        """Ask an earlier question in other words; it and what follows are forgotten.

        Its images stay, and so do those of later questions: all are shown with it.

        Args:
            index: of the exchange; -1 is the last one.

        Raises:
            DataError, ConfigError: as :meth:`ask`; then nothing is changed. Or no such exchange.
        """
        with self._lock:
            self.cancel()
            if not -len(self.exchanges) <= index < len(self.exchanges):
                raise DataError("there is no such question")
            index %= len(self.exchanges)
            kept, removed = self.exchanges[:index], self.exchanges[index:]
            images = [i for e in removed for i in e.images] + self.waiting
            return self._ask(kept, images, text, settings)

    def retry(self, **settings: Any) -> Answer:
        """Answer the last question again; arguments and errors as :meth:`edit`."""
        with self._lock:
            self._need_exchange()
            return self.edit(-1, self.exchanges[-1].text, **settings)

    def undo(self) -> Exchange:
        """Take back the last question and its answer; its images wait for the next one.

        Raises:
            DataError: there is none.
        """
        with self._lock:
            self.cancel()
            self._need_exchange()
            last = self.exchanges.pop()
            self.waiting = [*last.images, *self.waiting]
            self.forgotten = min(self.forgotten, len(self.exchanges))
            return last

    def clear_history(self) -> None:
        """Forget what was said; all images wait for the next question."""
        with self._lock:
            self.cancel()
            self.waiting = self.images
            self.exchanges = []
            self.forgotten = 0

    def clear(self) -> None:
        """Forget everything, and give the memory back."""
        with self._lock:
            self.clear_history()
            self.waiting = []
            self._cache.clear()

    def cancel(self) -> None:
        """End an answer that is being made; what there is of it stays."""
        answer = self._answer() if self._answer is not None else None
        if answer is not None:
            answer.cancel()

    def to_dict(self) -> dict[str, Any]:
        """The conversation as JSON can hold it; of the images only the names."""
        with self._lock:
            return {
                "system": self.system,
                "settings": dataclasses.asdict(self.settings),
                "exchanges": [
                    {
                        "images": [image.name for image in e.images],
                        "question": e.text,
                        "answer": e.answer,
                        "finish": e.finish,
                        "settings": dataclasses.asdict(e.settings) if e.settings else None,
                    }
                    for e in self.exchanges
                ],
            }

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values."""
        return self._cache.nbytes

    def _need_exchange(self) -> None:
        if not self.exchanges:
            raise DataError("nothing was asked yet")

    def _ask(
        self,
        before: list[Exchange],
        images: Sequence[ChatImage],
        text: str,
        settings: dict[str, Any],
    ) -> Answer:
        """Check everything, then change the conversation: an error leaves it as it was."""
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"the question is empty, or no text: {text!r}")
        exchange = Exchange(text, tuple(images))
        chosen = self.settings.changed(**settings)
        before_images = [i for e in before for i in e.images]
        start = min(self.forgotten, len(before))
        prompt, forgotten = fit_window(
            self._encoder,
            [(e.question, e.answer) for e in before],
            exchange.question,
            chosen.generation(),
            self.engine.model.context,
            start=start,
            free=FREE_AFTER_OVERFLOW,
        )
        self.exchanges, self.waiting = [*before, exchange], []
        self.forgotten = forgotten
        answer = Answer(
            self, exchange, prompt, (*before_images, *images), chosen, forgotten - start
        )
        self._answer = weakref.ref(answer)
        return answer


class Answer(Iterator[str]):
    """An answer that is made while it is read.

    Iterating computes the next tokens and gives pieces of text, which together are the exchange's
    ``answer``. Reading may end early, or fail, or be interrupted: what there is by then stays in
    the conversation, which goes on.

    Attributes:
        exchange: the question, and the answer so far.
        prompt: token ids of the prompt.
        images: of the prompt, in order.
        ids: token ids of the answer so far, without the one that stops it.
        reused: tokens of the prompt that had been computed before.
        dropped: exchanges that the model no longer sees since this question, for want of room.
        seed: what tokens are drawn with.
    """

    def __init__(
        self,
        conversation: Conversation,
        exchange: Exchange,
        prompt: list[int],
        images: tuple[ChatImage, ...],
        settings: ChatSettings,
        dropped: int,
    ) -> None:
        self.exchange = exchange
        self.prompt = prompt
        self.images = images
        self.ids: list[int] = []
        self.dropped = dropped
        self._conversation = conversation
        self._engine = conversation.engine
        self._settings = settings
        self._choose = TokenChooser(settings)
        self.seed = self._choose.seed
        exchange.settings = settings.changed(seed=self.seed) if settings.do_sample else settings
        self._text = TextStream(self._engine.tokenizer)
        self._content = self._engine.content(prompt, images)
        self.reused = min(conversation._cache.common(self._content), len(prompt) - 1)
        self._cancelled = threading.Event()
        self.finished = False
        """Whether there is no more to come."""

    def __next__(self) -> str:
        """The next piece of text, never empty.

        Raises:
            StopIteration: the answer has ended.
            WeightsError: the language model's output is not a number.
        """
        while not self.finished:
            with self._conversation._lock:
                if self._cancelled.is_set():
                    self.finished = True
                    break
                try:
                    piece = self._step()
                except BaseException:
                    self.finished = True
                    raise
            if piece:
                return piece
        raise StopIteration

    def read(self) -> str:
        """Make the whole answer, and return it."""
        for _ in self:
            pass
        return self.exchange.answer

    def cancel(self) -> None:
        """End it here. Can be called from any thread; when it returns, nothing more is added."""
        self._cancelled.set()
        with self._conversation._lock:
            self.finished = True

    def _step(self) -> str:
        cache = self._conversation._cache
        try:
            if self._settings.num_beams > 1:
                return self._search()
            logits = self._engine.extend(cache, [*self._content, *self.ids], self.images)
            return self._add(self._choose(logits, self.ids))
        except WeightsError:
            cache.clear()  # whatever is in there must not spoil what follows
            raise

    def _search(self) -> str:
        """Beam search knows the answer's first word only when it has the last one."""
        found = self._engine.search(
            self._conversation._cache,
            self._content,
            self.images,
            self._settings,
            self._cancelled.is_set,
        )
        piece = ""
        for token in found:
            if not self.finished:
                piece += self._add(token)
        self.finished = True  # without a stop: cancelled
        return piece

    def _add(self, token: int) -> str:
        if token in self._engine.stops:
            self._finish("stop")
            return ""
        self.ids.append(token)
        piece = self._text.push(token)
        self.exchange.answer = self._text.text
        if len(self.ids) == self._settings.max_new_tokens:
            self._finish("length")
        return piece

    def _finish(self, finish: Finish) -> None:
        self.finished = True
        self.exchange.finish = finish
