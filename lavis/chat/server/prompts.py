"""Requests -> prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lavis.chat.engine import ChatEngine, ChatImage
from lavis.chat.server.pictures import Pictures
from lavis.chat.server.protocol import ApiError, ChatBody, ImagePart, Message, TextPart
from lavis.chat.settings import ChatSettings
from lavis.common.errors import ConfigError, DataError
from lavis.processors.chatml import as_typed
from lavis.processors.conversation import IMAGE, Turn, show_in_turns

_CHARACTERS_A_TOKEN = 16  # many more than any text has


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may ask for.

    Attributes:
        body_bytes: of a request, and of a picture that is fetched.
        pictures: of a request.
        pixels: of a picture.
        messages: of a request.
        parallel: requests that are answered at once.
        queue: requests that wait for that.
        seconds: from a request's arrival to the last byte of its answer.
        conversations: whose keys and values are kept for their next request.
        hosts: that pictures are fetched from.
    """

    body_bytes: int = 32_000_000
    pictures: int = 16
    pixels: int = 50_000_000
    messages: int = 512
    parallel: int = 16
    queue: int = 64
    seconds: float = 300.0
    conversations: int = 64
    hosts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Prompt:
    """What the language model reads.

    Attributes:
        ids: image spans included.
        images: in order of the spans.
        settings: how the answer is chosen.
    """

    ids: list[int]
    images: tuple[ChatImage, ...]
    settings: ChatSettings


class Prompts:
    """Makes prompts of requests, and refuses those that pass a limit or the context."""

    def __init__(self, engine: ChatEngine, limits: Limits, defaults: ChatSettings) -> None:
        """Take what requests may ask for, and the settings where they do not say."""
        self._model, self._limits, self._defaults = engine.model, limits, defaults
        self._pictures = Pictures(
            engine, max_pixels=limits.pixels, max_bytes=limits.body_bytes, hosts=limits.hosts
        )

    def __call__(self, body: ChatBody) -> Prompt:
        """The prompt of a request. Pictures are looked at when all else is well.

        Raises:
            ApiError: naming what is wrong.
        """
        system, messages = self._roles(body.messages)
        urls = self._pictures_of(body.messages)
        self._require_size(body.messages, urls)
        turns: Sequence[Turn] = [
            Turn("user" if m.role == "user" else "assistant", _text(m)) for m in messages
        ]
        model = self._model
        encoder = model.encoder if system is None else replace(model.encoder, system=system)
        images: tuple[ChatImage, ...] = ()
        for known in (False, True):  # first as if each took the least
            if known:
                images = tuple(self._pictures(url, param) for param, url in urls.items())
                turns = show_in_turns(turns, [image.places for image in images])
            try:
                ids = encoder.prompt(turns)
                settings = _settings(body, self._room(body, len(ids)), self._defaults)
            except (ConfigError, DataError) as error:
                raise ApiError(str(error), code="invalid_value") from error
        return Prompt(ids, images, settings)

    def _roles(self, messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
        """The system prompt, and the rest: user and assistant in turn, the user last."""
        leading = messages[0].role in ("system", "developer")
        for n, message in enumerate(messages[leading:], start=int(leading)):
            wanted = "assistant" if (n - leading) % 2 else "user"
            if message.role != wanted:
                raise ApiError(
                    f"messages.{n} is of role {message.role}, but {wanted} is next: user and "
                    "assistant speak in turn, after at most one system message",
                    param=f"messages.{n}.role", code="invalid_value",
                )  # fmt: skip
        if messages[-1].role != "user":
            raise ApiError("the last message must be of role user", param="messages")
        return (_words(messages[0]) if leading else None), messages[leading:]

    def _pictures_of(self, messages: Sequence[Message]) -> dict[str, str]:
        """Addresses of the pictures, by where they stand in the request."""
        urls = {}
        for n, message in enumerate(messages):
            for k, part in enumerate(message.parts):
                if not isinstance(part, ImagePart):
                    continue
                param = f"messages.{n}.content.{k}.image_url.url"
                if message.role != "user":
                    raise ApiError("only a user's message can show a picture", param=param)
                urls[param] = part.image_url.url
            if message.role == "user" and not _words(message).strip():
                raise ApiError(
                    f"messages.{n} has no text: ask something", param=f"messages.{n}.content"
                )
        return urls

    def _require_size(self, messages: Sequence[Message], urls: dict[str, str]) -> None:
        if len(messages) > self._limits.messages:
            raise ApiError(
                f"{len(messages)} messages are more than the {self._limits.messages} that this "
                "server takes: leave out the oldest",
                param="messages", code="too_many_messages",
            )  # fmt: skip
        if len(urls) > self._limits.pictures:
            raise ApiError(
                f"{len(urls)} pictures are more than the {self._limits.pictures} that this server "
                "takes in a request",
                param="messages", code="too_many_images",
            )  # fmt: skip
        context = self._model.context
        characters = sum(len(_words(message)) for message in messages)
        if characters > _CHARACTERS_A_TOKEN * context:
            raise _too_long(f"{characters} characters", context)

    def _room(self, body: ChatBody, prompt: int) -> int:
        """How long the answer may be: what is asked for, or what the context leaves of the
        server's own limit."""
        context = self._model.context
        if prompt + (body.limit or 1) > context:
            more = f" and {body.limit_name} {body.limit}" if body.limit else ""
            raise _too_long(f"{prompt} tokens{more}", context)
        return body.limit or min(self._defaults.max_new_tokens, context - prompt)


def _words(message: Message) -> str:
    return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def _text(message: Message) -> str:
    """A message's text with its pictures in place.

    Pictures that all follow the text are put in front of it, where training has them.
    """
    if message.role != "user":
        return _words(message)
    parts = message.parts
    shown = [isinstance(part, ImagePart) for part in parts]
    if True in shown and all(shown[shown.index(True) :]):
        parts = sorted(parts, key=lambda part: isinstance(part, TextPart))
    text = ""
    for before, part in zip([None, *parts], parts, strict=False):
        if isinstance(part, ImagePart):
            text += IMAGE
            continue
        between = "" if before is None else "\n" if isinstance(before, TextPart) else " "
        text += between + as_typed(part.text)
    return text


def _settings(body: ChatBody, limit: int, defaults: ChatSettings) -> ChatSettings:
    """How an answer is chosen: drawn if the request gives a temperature, or limits the draw."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    narrowed = given.get("top_p", 1) != 1 or "top_k" in given
    drawn = given.pop("temperature", 1 if narrowed else 0)
    if drawn:
        given |= {"do_sample": True, "temperature": drawn}
    return defaults.changed(max_new_tokens=limit, **given)


def _too_long(what: str, context: int) -> ApiError:
    return ApiError(
        f"{what} pass this model's context of {context} tokens: leave out the oldest messages, or "
        "ask for a shorter answer; the server drops nothing by itself",
        param="messages", code="context_length_exceeded",
    )  # fmt: skip
