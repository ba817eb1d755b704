"""Answers of a stock vLLM: our side makes the prompt's embeddings, its side continues them.

vLLM's documentation, "Prompt Embedding Inputs": with ``--enable-prompt-embeds`` its
``POST /v1/completions`` takes ``prompt_embeds``, a (T, C) tensor as ``torch.save`` writes it, in
base64. It applies no chat template to them.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import torch
from torch import Tensor

from lavis.chat.engine import ChatEngine
from lavis.chat.server.answers import Begun, Ended, Event
from lavis.chat.server.prompts import Limits, Prompt, Prompts
from lavis.chat.server.protocol import ApiError, ChatBody, Json
from lavis.chat.settings import ChatSettings
from lavis.common.errors import ConfigError


class RemoteAnswers:
    """Answers that a vLLM server makes of our embeddings."""

    def __init__(
        self,
        engine: ChatEngine,
        limits: Limits,
        defaults: ChatSettings,
        url: str,
        *,
        model: str,
        api_key: str | None = None,
    ) -> None:
        """Take its address.

        Args:
            url: that ends in ``/v1``.
            model: the name that it serves the language model under.
            api_key: its own, if it wants one.

        Raises:
            ConfigError: the address cannot be one.
        """
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ConfigError(f"--prompt-embeds {url}: {error}") from error
        if parts.scheme not in ("http", "https") or not self._host:
            raise ConfigError(f"--prompt-embeds {url}: give http://HOST:PORT/v1")
        secure = parts.scheme == "https"
        self._connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._path = f"{parts.path.rstrip('/')}/completions"
        self._engine, self._model, self._seconds = engine, model, limits.seconds
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._prompts = Prompts(engine, limits, defaults)

    def answer(self, body: ChatBody, stopped: Callable[[], bool]) -> Iterator[Event]:
        """As :meth:`Backend.answer`."""
        prompt = self._prompts(body)
        connection = self._connection(self._host, self._port, timeout=self._seconds)
        try:
            connection.request("POST", self._path, self._request(prompt, body), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _refused(response.status, response.read(10_000))
            yield Begun(len(prompt.ids), 0)
            yield from _events(response, stopped)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ApiError(f"the server behind this one cannot be used: {error}", 502) from error
        finally:
            connection.close()  # which ends the answer there, if it is not complete

    def _request(self, prompt: Prompt, body: ChatBody) -> str:
        chosen = prompt.settings
        request: Json = {
            "model": self._model,
            "prompt_embeds": encode(self._engine.prompt_embeds(prompt.ids, prompt.images)),
            "max_tokens": chosen.max_new_tokens,
            "temperature": chosen.temperature if chosen.do_sample else 0,
            "top_p": chosen.top_p,
            "repetition_penalty": chosen.repetition_penalty,
            "stop": body.stops,
            "stop_token_ids": list(self._engine.stops),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if chosen.top_k:
            request["top_k"] = chosen.top_k
        if chosen.seed is not None:
            request["seed"] = chosen.seed
        return json.dumps(request)


def encode(embeds: Tensor) -> str:
    """(T, C) embeddings as vLLM reads them."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().contiguous(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _events(lines: http.client.HTTPResponse, stopped: Callable[[], bool]) -> Iterator[Event]:
    """The pieces of a stream of completions, without white space at the answer's ends.

    Raises:
        ApiError: the stream reports an error.
        ValueError: it ends too early, or is no such stream.
    """
    finish, tokens, space, begun = None, None, "", False
    for line in lines:
        if stopped():
            return
        if not line.startswith(b"data:"):
            continue
        if line[5:].strip() == b"[DONE]":
            break
        chunk = json.loads(line[5:])
        if "error" in chunk:
            raise _refused(502, line[5:])
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        for choice in chunk.get("choices", ()):
            text = space + choice["text"]
            text = text if begun else text.lstrip()
            piece = text.rstrip()
            space, begun = text[len(piece) :], begun or bool(piece)
            finish = choice.get("finish_reason") or finish
            if piece:
                yield piece
    if finish not in ("stop", "length") or tokens is None:
        raise ValueError("its answer ends without a reason to finish and a count of tokens")
    yield Ended(finish, tokens)


def _refused(status: int, body: bytes) -> ApiError:
    try:
        content = json.loads(body)
        said = content.get("error", content)
        text = str(said.get("message", said))
    except (ValueError, AttributeError, TypeError):
        text = body.decode("utf-8", "replace")
    known = status if status in (400, 429, 503) else 502
    return ApiError(f"the server behind this one refuses: {text[:500]}", known)
