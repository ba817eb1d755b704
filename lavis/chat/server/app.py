"""OpenAI's chat completions over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lavis.chat.server.answers import Backend, Begun, Ended, Event
from lavis.chat.server.heap import give_back
from lavis.chat.server.prompts import Limits
from lavis.chat.server.protocol import ApiError, ChatBody, Json, Reply, usage

logger = logging.getLogger(__name__)
_IDLE = 1.0  # seconds without a request until freed memory is given back


class _GoneError(Exception):
    """The client went away."""


class Job:
    """A request that is answered in a thread and read in the event loop."""

    def __init__(self, seconds: float) -> None:
        """Begin to count its time."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._stopped = threading.Event()
        self._future: Future[None] | None = None
        late = ApiError(f"the answer took longer than {seconds:g} seconds", 504, code="timeout")
        self.deadline = self._loop.time() + seconds
        self._timer = self._loop.call_at(self.deadline, self.fail, late)

    def start(
        self,
        threads: ThreadPoolExecutor,
        backend: Backend,
        body: ChatBody,
        leave: Callable[[], None],
    ) -> None:
        """Have it answered as soon as a thread is free; ``leave`` is called when that is over."""
        self._future = threads.submit(self._work, backend, body)
        self._future.add_done_callback(lambda _: self._call(leave))

    def _work(self, backend: Backend, body: ChatBody) -> None:
        try:
            for event in backend.answer(body, self._stopped.is_set):
                self._put(event)
        except ApiError as error:
            self._put(error)
        except Exception as error:  # noqa: BLE001 -- logged
            self._put(_failure(error))

    def _put(self, event: Event | Exception) -> None:
        self._call(lambda: self._events.put_nowait(event))

    def _call(self, act: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, nobody reads
            self._loop.call_soon_threadsafe(act)

    async def next(self) -> Event:
        """What happens next; raises what went wrong."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def fail(self, error: Exception) -> None:
        """End it here; whoever reads it gets the error."""
        self.stop()
        self._events.put_nowait(error)

    def stop(self) -> None:
        """End it: nobody reads any more."""
        self._timer.cancel()
        self._stopped.set()
        if self._future is not None:
            self._future.cancel()  # if it still waits for a thread


class EventStream(StreamingResponse):
    """Server-sent events of a job, which ends with them, however that comes."""

    def __init__(self, content: AsyncIterator[str], job: Job) -> None:
        super().__init__(content, media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them; a client that does not read is cut off when its time is over."""
        try:
            async with asyncio.timeout_at(self._job.deadline + 1):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.warning("a client that read too slowly was cut off")
        finally:
            self._job.stop()


class ChatServer:
    """Answers requests with a backend; ``app`` is the ASGI application."""

    def __init__(
        self, backend: Backend, limits: Limits, *, model: str, api_key: str | None = None
    ) -> None:
        """Build the application.

        Args:
            model: the name that requests must give.
            api_key: that requests must have in ``Authorization: Bearer``.
        """
        self._backend, self._limits, self._model = backend, limits, model
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._threads = ThreadPoolExecutor(limits.parallel, thread_name_prefix="answer")
        self._active = 0
        self._rest: asyncio.TimerHandle | None = None
        self.app = FastAPI(openapi_url=None)
        self.app.add_route("/health", self._health, ["GET"])
        self.app.add_route("/v1/models", self._models, ["GET"])
        self.app.add_route("/v1/models/{name:path}", self._models, ["GET"])
        self.app.add_route("/v1/chat/completions", self._complete, ["POST"])
        for kind, handler in (
            (ApiError, _refuse), (HTTPException, _refuse), (Exception, _refuse),
            (_GoneError, _nobody), (ClientDisconnect, _nobody),
        ):  # fmt: skip
            self.app.add_exception_handler(kind, handler)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "active": self._active})

    async def _models(self, request: Request) -> Response:
        self._authorize(request)
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "lavis"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        self._require_model(request.path_params["name"])
        return JSONResponse(model)

    async def _complete(self, request: Request) -> Response:
        self._authorize(request)
        if self._active >= self._limits.parallel + self._limits.queue:
            raise ApiError("too many requests are waiting: try again in a moment", 429, code="busy")
        self._active += 1
        if self._rest is not None:
            self._rest.cancel()
        job = Job(self._limits.seconds)
        try:
            body = await self._body(request, job.deadline)
            self._require_model(body.model)
            job.start(self._threads, self._backend, body, self._leave)
        except BaseException:
            job.stop()
            self._leave()
            raise
        try:
            return await self._answer(request, body, job)
        except BaseException:
            job.stop()
            raise

    def _leave(self) -> None:
        self._active -= 1
        if not self._active:
            self._rest = asyncio.get_running_loop().call_later(_IDLE, give_back)

    async def _body(self, request: Request, deadline: float) -> ChatBody:
        """The request's body.

        Raises:
            ApiError: it is too large, too slow, or says what cannot be done.
        """
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            # A page in a browser can send other kinds to any address without being asked.
            raise ApiError("send the body as Content-Type: application/json", 415)
        limit, declared = self._limits.body_bytes, request.headers.get("content-length", "0")
        large = ApiError(
            f"the body is larger than the {limit / 1e6:g} MB that this server takes: send fewer or "
            "smaller pictures", 413, code="request_too_large",
        )  # fmt: skip
        if not declared.isdigit() or len(declared) > 18 or int(declared) > limit:
            raise large
        body = bytearray()
        try:
            async with asyncio.timeout_at(deadline):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise large
        except TimeoutError:
            raise ApiError("the request took too long to arrive", 408) from None
        return await asyncio.to_thread(ChatBody.read, bytes(body))

    async def _answer(self, request: Request, body: ChatBody, job: Job) -> Response:
        options = body.stream_options
        reply = Reply(
            secrets.token_hex(12), self._model, with_usage=bool(options and options.include_usage)
        )
        watch = asyncio.create_task(_watch(request, job))
        try:
            begun = await job.next()
            assert isinstance(begun, Begun)
            if body.stream:
                return EventStream(_stream(job, begun, reply), job)
            pieces: list[str] = []
            while not isinstance(event := await job.next(), Ended):
                pieces.append(str(event))
        finally:
            watch.cancel()
        job.stop()
        return JSONResponse(reply.whole("".join(pieces), event.finish, _counts(begun, event)))

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self._key is not None and not hmac.compare_digest(given, self._key):
            raise ApiError(
                "this server wants its key, as Authorization: Bearer KEY",
                401,
                code="invalid_api_key",
            )

    def _require_model(self, name: str) -> None:
        if name != self._model:
            raise ApiError(
                f"there is no model {name[:100]!r}; this server has {self._model!r}",
                404, param="model", code="model_not_found",
            )  # fmt: skip


async def _watch(request: Request, job: Job) -> None:
    """End a job whose client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.fail(_GoneError())


async def _stream(job: Job, begun: Begun, reply: Reply) -> AsyncIterator[str]:
    yield _event(reply.chunk({"role": "assistant", "content": ""}))
    try:
        while not isinstance(event := await job.next(), Ended):
            yield _event(reply.chunk({"content": event}))
    except ApiError as error:  # the status was sent: only the stream can say it
        yield _event(error.body())
        return
    for chunk in (reply.chunk({}, event.finish), *reply.counts(_counts(begun, event))):
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _counts(begun: Begun, ended: Ended) -> Json:
    return usage(begun.prompt_tokens, begun.cached_tokens, ended.completion_tokens)


async def _refuse(request: Request, error: Exception) -> Response:
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, HTTPException):
        error = ApiError(
            f"{error.detail}: there are POST /v1/chat/completions, GET /v1/models and GET /health",
            error.status_code,
        )
    elif not isinstance(error, ApiError):
        error = _failure(error)
    headers |= {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(
        error.status, {}
    )
    return JSONResponse(error.body(), error.status, headers)


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client is gone


def _failure(error: Exception) -> ApiError:
    """What a client is told of a fault that is not its own; no text of Python's leaves the log."""
    logger.error("a request failed", exc_info=error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return ApiError("the server ran out of memory: try again, or ask for less", 503)
    return ApiError("the server failed; its log says why", 500)


def http_server(app: FastAPI, grace: int) -> uvicorn.Server:
    """Serves until SIGINT or SIGTERM; then no request is taken any more, and answers that are
    being made have ``grace`` seconds to end."""
    return uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", ws="none",
            server_header=False, timeout_graceful_shutdown=grace,
        )
    )  # fmt: skip
