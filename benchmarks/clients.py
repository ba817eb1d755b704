"""What clients of a server do: ask as OpenAI's do, read slowly, vanish, or send what is wrong."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import Image

from examples.toybox.world.scenes import draw, random_scene
from lavis.common.errors import LavisError

QUESTIONS = ("What is in the picture?", "图里有几个物体？", "Describe this image in detail.")
_BYTES, _EVERY = 16, 0.02  # that a slow reader takes at once, and seconds until it takes more
_PAUSE = 0.5  # seconds between a hostile client's requests


@dataclass
class Asked:
    """A turn.

    Attributes:
        pieces: of the answer, as they came.
        first: seconds to the first of them.
        usage: OpenAI's counts of tokens.
    """

    question: str
    pieces: list[str]
    first: float
    usage: dict[str, Any]

    @property
    def computed(self) -> int:
        """Tokens of the prompt that had not been computed before."""
        return int(
            self.usage["prompt_tokens"] - self.usage["prompt_tokens_details"]["cached_tokens"]
        )


def picture(number: int) -> bytes:
    """The PNG file of a drawn scene."""
    rng, file = random.Random(number), io.BytesIO()
    draw(random_scene(rng, held_out=None), rng).save(file, "PNG")
    return file.getvalue()


def shown(content: bytes) -> dict[str, Any]:
    """A file as the part of a message that shows it."""
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def messages_of(number: int, talk: Sequence[Asked], question: str) -> list[Any]:
    """The next request of a conversation about a picture."""
    messages: list[Any] = []
    for asked in talk:
        messages.append({"role": "user", "content": [{"type": "text", "text": asked.question}]})
        messages.append({"role": "assistant", "content": "".join(asked.pieces)})
    messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    messages[0]["content"].insert(0, shown(picture(number)))
    return messages


def body_of(messages: list[Any]) -> dict[str, Any]:
    """A request for a streamed answer with its counts."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": "toybox", "messages": messages, **options}


class Stream:
    """The answer that a stream's lines give."""

    def __init__(self) -> None:
        self._begun, self._first = time.perf_counter(), 0.0
        self._pieces: list[str] = []
        self._usage: dict[str, Any] | None = None

    def read(self, line: str) -> bool:
        """Read a line; gives whether it has a piece of the answer.

        Raises:
            LavisError: it reports an error.
        """
        if not line.startswith("data: {"):
            return False
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise LavisError(chunk["error"]["message"])
        pieces = [c["delta"]["content"] for c in chunk["choices"] if c["delta"].get("content")]
        if pieces:
            self._first = self._first or time.perf_counter() - self._begun
            self._pieces += pieces
        self._usage = chunk["usage"] or self._usage
        return bool(pieces)

    def asked(self, question: str) -> Asked:
        """All of it.

        Raises:
            LavisError: the end is missing.
        """
        if self._usage is None:
            raise LavisError("an answer without its end")
        return Asked(question, self._pieces, self._first, self._usage)


async def ask(client: httpx.AsyncClient, messages: list[Any]) -> Asked:
    """Ask, and read the answer as it comes."""
    stream = Stream()
    async with client.stream("POST", "chat/completions", json=body_of(messages)) as response:
        if response.status_code != 200:
            raise LavisError((await response.aread()).decode())
        async for line in response.aiter_lines():
            stream.read(line)
    return stream.asked(messages[-1]["content"][-1]["text"])


@dataclass(frozen=True)
class Wrong:
    """A request that is to be refused.

    Attributes:
        content: its body, or as much as ever comes of it.
        status: of the answer.
        code: of the answer's error, if it has one.
        headers: instead of the usual ones.
    """

    content: bytes
    status: int
    code: str | None = None
    headers: tuple[str, ...] = ()


def wrong_requests(body_mb: int) -> dict[str, Wrong]:
    """By what is wrong with them.

    Args:
        body_mb: what the server takes.
    """

    long = "context_length_exceeded"

    def said(*messages: Any) -> bytes:
        return json.dumps(body_of(list(messages))).encode()

    def user(content: object) -> dict[str, object]:
        return {"role": "user", "content": content}

    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    words = {"type": "text", "text": QUESTIONS[0]}
    answer = {"role": "assistant", "content": "A red star. " * 20}
    chunk = f"{10**6:x}\r\n".encode() + b" " * 10**6 + b"\r\n"
    elsewhere = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
    return {
        "broken JSON": Wrong(said(user("a"))[:-1], 400),
        "no UTF-8": Wrong(b"\xff" * 1000, 400),
        "body too large by its header": Wrong(
            b"", 413, "request_too_large", (f"Content-Length: {body_mb + 1}000000",)
        ),
        "body too large, in parts": Wrong(
            chunk * (body_mb + 1), 413, "request_too_large", ("Transfer-Encoding: chunked",)
        ),
        "history past the context": Wrong(
            said(*[user("What is this?"), answer] * 150, user("a")), 400, long
        ),
        "history of a megabyte": Wrong(said(user("word " * 200_000)), 400, long),
        "601 messages": Wrong(
            said(*[user("a"), answer] * 300, user("a")), 400, "too_many_messages"
        ),
        "no picture": Wrong(said(user([shown(b"\0" * 1000), words])), 400, "invalid_image"),
        "100 million pixels": Wrong(
            said(user([shown(file.getvalue()), words])), 400, "invalid_image"
        ),
        "a picture elsewhere": Wrong(said(user([elsewhere, words])), 400, "invalid_image_url"),
        "a form": Wrong(said(user("a")), 415, None, ("Content-Type: text/plain",)),
        "a body that stops coming": Wrong(b'{"model": ', 408, None, ("Content-Length: 1000",)),
    }  # fmt: skip


@dataclass
class Hostile:
    """Clients that talk to a server for some time, and what they saw.

    Attributes:
        ends: by what they did, how often what came of it.
        slow: answers of those that read slowly, by the numbers of their pictures.
        wanted: by what they did, what is to come of it.
    """

    address: str
    body_mb: int
    ends: dict[str, Counter[str]] = field(default_factory=dict)
    slow: dict[int, list[Asked]] = field(default_factory=dict)
    wanted: dict[str, str] = field(default_factory=dict)

    def loops(self, over: Callable[[], bool]) -> Iterator[Awaitable[None]]:
        """All of them, until ``over``: three slow readers, four that vanish, and one for each
        request that is wrong."""
        rng = random.Random(0)
        numbers = itertools.count(10**6)
        for _ in range(3):
            yield self._repeat("reads slowly", "whole", over, lambda: self._slow(next(numbers)))
        for _ in range(2):
            yield self._repeat(
                "vanishes in the stream", "gone", over, lambda: self._vanish(rng.randint(1, 5))
            )
        yield self._repeat("vanishes before the answer", "gone", over, lambda: self._vanish(0))
        yield self._repeat("vanishes in its own request", "gone", over, self._half)
        for name, wrong in wrong_requests(self.body_mb).items():
            wanted = f"{wrong.status} {wrong.code}"
            yield self._repeat(name, wanted, over, partial(self._refused, wrong))

    @property
    def surprises(self) -> dict[str, dict[str, int]]:
        """What came otherwise than wanted."""
        pairs = ((name, dict(ends)) for name, ends in self.ends.items())
        return {name: ends for name, ends in pairs if set(ends) != {self.wanted[name]}}

    async def _repeat(
        self, name: str, wanted: str, over: Callable[[], bool], act: Callable[[], Awaitable[str]]
    ) -> None:
        self.wanted[name] = wanted
        ends = self.ends.setdefault(name, Counter())
        while not over():
            try:
                ends[await act()] += 1
            except (LavisError, OSError) as error:
                ends[f"{type(error).__name__}: {error}"] += 1
            await asyncio.sleep(_PAUSE)

    def _socket(self) -> socket.socket:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # little is on its way
        parts = urlsplit(self.address)
        plain.connect((parts.hostname, parts.port))
        plain.setblocking(False)
        return plain

    async def _send(self, plain: socket.socket, content: bytes, *headers: str) -> None:
        """Send a request, as far as it is taken."""
        usual = ("Content-Type: application/json", f"Content-Length: {len(content)}")
        for line in usual:
            name = line.partition(":")[0]
            other = name if name == "Content-Type" else "Content-Length|Transfer-Encoding"
            if not any(re.match(other, header) for header in headers):
                headers += (line,)
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Connection: close", *headers]
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(plain, "\r\n".join([*head, "", ""]).encode() + content)

    async def _refused(self, wrong: Wrong) -> str:
        loop = asyncio.get_running_loop()
        with self._socket() as plain:
            with contextlib.suppress(ConnectionError):  # it is refused before all of it is sent
                await self._send(plain, wrong.content, *wrong.headers)
            got = b""
            while b"}}" not in got and (part := await loop.sock_recv(plain, 4096)):
                got += part
        code = re.search(rb'"code":(?:"(\w+)"|null)', got)
        if not got.startswith(b"HTTP/1.1 ") or code is None:
            return repr(got[:200])
        return f"{int(got[9:12])} {code[1].decode() if code[1] else None}"

    async def _slow(self, number: int) -> str:
        """Read a few bytes now and then."""
        loop, stream = asyncio.get_running_loop(), Stream()
        question, rest = QUESTIONS[number % len(QUESTIONS)], b""
        with self._socket() as plain:
            await self._send(plain, json.dumps(body_of(messages_of(number, [], question))).encode())
            while part := await loop.sock_recv(plain, _BYTES):
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    stream.read(line.decode())
                await asyncio.sleep(_EVERY)
        self.slow[number] = [stream.asked(question)]
        return "whole"

    async def _vanish(self, pieces: int) -> str:
        """Go after some pieces of the answer."""
        loop, stream, rest = asyncio.get_running_loop(), Stream(), b""
        content = json.dumps(body_of(messages_of(random.randrange(10**5), [], QUESTIONS[2])))
        with self._socket() as plain:
            await self._send(plain, content.encode())
            while pieces:
                if not (part := await loop.sock_recv(plain, 4096)):
                    raise LavisError("an answer without its end")
                *lines, rest = (rest + part).split(b"\n")
                pieces = max(pieces - sum(stream.read(line.decode()) for line in lines), 0)
            await asyncio.sleep(0.05 * random.random())
        return "gone"

    async def _half(self) -> str:
        content = json.dumps(body_of(messages_of(0, [], QUESTIONS[0]))).encode()
        with self._socket() as plain:
            await self._send(plain, content[:1000], f"Content-Length: {len(content)}")
            await asyncio.sleep(0.05)
        return "gone"
