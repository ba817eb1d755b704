"""OpenAI's chat completions: what a request may say, and what is sent back."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lavis.common.registry import did_you_mean

Json = dict[str, Any]
"""An object of JSON."""
Finish = Literal["stop", "length"]

# Said by many clients although they change nothing.
_NEUTRAL: Json = {
    "n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "logit_bias": {},
    "response_format": {"type": "text"}, "tools": [], "annotations": [], "tool_calls": [],
}  # fmt: skip


class ApiError(Exception):
    """A request that is not answered, as OpenAI's clients read it."""

    def __init__(
        self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None
    ) -> None:
        """Say why.

        Args:
            status: of HTTP.
            param: the part of the request at fault, such as ``messages.0.content``.
            code: of OpenAI's, for programs.
        """
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> Json:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, default)
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }


class _Part(BaseModel):
    """A part of a request: what it does not know is refused, ``null`` is as if left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_effect(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None and (k, v) not in _NEUTRAL.items()}


class TextPart(_Part):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    """Where a picture is; ``detail`` changes nothing: pictures have the encoder's one size."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Part):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Part):
    """What one side says; only a user shows pictures."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content's parts; a text is one."""
        content = self.content
        return [TextPart(type="text", text=content)] if isinstance(content, str) else content


class StreamOptions(_Part):
    """``include_usage`` adds a last chunk with the counts of tokens."""

    include_usage: bool = False


class ChatBody(_Part):
    """The body of ``POST /v1/chat/completions``."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = []
    seed: int | None = None
    temperature: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """The strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def limit(self) -> int | None:
        """The longest answer that is asked for, in tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        """The parameter that says so."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if len(self.stops) > 4 or not all(0 < len(stop) <= 256 for stop in self.stops):
            raise ValueError("stop is at most 4 strings of 1 to 256 characters")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one of them")
        return self

    @classmethod
    def read(cls, body: bytes) -> ChatBody:
        """Read a request's body.

        Raises:
            ApiError: naming the first thing that is wrong.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            # Of the kinds that a value may have, the one that was meant got deepest.
            worst = max(error.errors(include_input=False), key=lambda e: len(e["loc"]))
            raise _explained(worst["type"], worst["loc"], worst["msg"]) from None


_NAMES = {
    *ChatBody.model_fields, *Message.model_fields, *TextPart.model_fields, *ImagePart.model_fields,
    *ImageUrl.model_fields, *StreamOptions.model_fields,
}  # fmt: skip


def _explained(kind: str, place: tuple[int | str, ...], message: str) -> ApiError:
    """Pydantic's finding in OpenAI's words."""
    if kind == "json_invalid":
        return ApiError(f"The body is no JSON ({message}): send one JSON object in UTF-8")
    param = _param(place, unknown=kind == "extra_forbidden")
    if kind == "extra_forbidden":
        near = did_you_mean(str(place[-1]), list(ChatBody.model_fields))
        text = f"Unknown or unsupported parameter {param}{near or ': leave it out'}"
        return ApiError(text, param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(f"{param} is missing", param=param, code="missing_required_parameter")
    text = message.removeprefix("Value error, ")
    return ApiError(f"{param}: {text}" if param else text, param=param, code="invalid_value")


def _param(place: tuple[int | str, ...], *, unknown: bool) -> str | None:
    """Pydantic's place without what the request does not have: the kinds of values."""
    last = len(place) - 1
    steps = [
        str(step)
        for i, step in enumerate(place)
        if (isinstance(step, int) or step in _NAMES or (unknown and i == last))
        and not (i and isinstance(place[i - 1], int) and step in ("text", "image_url") and i < last)
    ]
    return ".".join(steps) or None


def usage(prompt: int, cached: int, completion: int) -> Json:
    """Counts of tokens; ``cached`` are those of the prompt that had been computed before."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Reply:
    """What is sent back to one request."""

    def __init__(self, number: str, model: str, *, with_usage: bool = False) -> None:
        self._base = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": model}
        self._with_usage = with_usage

    def whole(self, text: str, finish: Finish, counts: Json) -> Json:
        """The answer in one piece."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return {**self._base, "object": "chat.completion", "choices": [choice], "usage": counts}

    def chunk(self, delta: Json, finish: Finish | None = None) -> Json:
        """A piece of an answer, or its end."""
        return self._chunk([{"index": 0, "delta": delta, "finish_reason": finish}], None)

    def counts(self, counts: Json) -> list[Json]:
        """The chunk after the end, if it was asked for."""
        return [self._chunk([], counts)] if self._with_usage else []

    def _chunk(self, choices: list[Json], counts: Json | None) -> Json:
        more = {"usage": counts} if self._with_usage else {}
        return {**self._base, "object": "chat.completion.chunk", "choices": choices, **more}
