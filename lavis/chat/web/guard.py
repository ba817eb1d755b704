"""What stands between the network and Gradio: few routes, plain values, uploads with an owner."""

from __future__ import annotations

import json
import re
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lavis.chat.web.texts import LIMITS, ToldError, language_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_FILES = LIMITS["files"]
MAX_FILE_BYTES = LIMITS["file_mb"] * 10**6
MAX_UPLOAD_BYTES = LIMITS["upload_mb"] * 10**6
_MAX_BODY_BYTES = 256_000
_MAX_PENDING = 32
_MAX_SESSIONS_KNOWN = 10_000

COOKIE = "lavis_chat"
_CLIENT = re.compile(r"[\w-]{22,64}")
_GET = re.compile(
    r"/|/config/?|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/(assets|static|svelte)/.+|"
    r"/gradio_api/(startup-events|app_id|theme\.css|queue/data|upload_progress|heartbeat/[^/]+)"
)
_POST = re.compile(r"/gradio_api/(queue/join|cancel|run/[^/]+|upload|reset)/?")

# Gradio's page needs inline scripts; nothing may come from, or go to, another host.
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        b"worker-src 'self' blob:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Uploads:
    """Files on their way from a browser to a conversation.

    A file lies in a private folder under a random name until the browser that sent it takes it,
    once. Clients hold that name only, never a path.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lavis-web-", ignore_cleanup_errors=True)
        self._pending: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """Where they lie; removed by :meth:`close` and at exit."""
        return Path(self._folder.name)

    def add(self, client: str, name: str, content: bytes) -> str:
        """Keep a file; returns its random name. The oldest goes if too many wait."""
        token = secrets.token_urlsafe(24)
        (self.folder / token).write_bytes(content)
        shown = "".join(c for c in name.replace("\\", "/").split("/")[-1] if c.isprintable())
        with self._lock:
            self._pending[token] = (client, shown[-80:] or "image")
            gone = self._pending.popitem(last=False)[0] if len(self._pending) > _MAX_PENDING else ""
        if gone:
            (self.folder / gone).unlink(missing_ok=True)
        return token

    def take(self, client: str, token: str) -> tuple[Path, str] | None:
        """The file and the name to show, for its owner and once. The caller deletes the file."""
        with self._lock:
            owner, name = self._pending.get(token, ("", ""))
            if not client or owner != client:
                return None
            del self._pending[token]
        return self.folder / token, name

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()


def client_of(request: Any) -> str:
    """The browser's own secret, or "" if it sent none."""
    value = request.cookies.get(COOKIE, "")
    return value if _CLIENT.fullmatch(value) else ""


class Guard:
    """ASGI middleware in front of Gradio.

    Gradio serves more than this page uses: files, a proxy to other hosts, the REST interface,
    recordings, run history. All of that answers 404. A session belongs to the browser that
    began it.
    """

    def __init__(self, app: Any, uploads: Uploads, language: str = "auto") -> None:
        """Stand before ``app``; ``language`` of refusals is the page's."""
        self._app = app
        self._uploads = uploads
        self._language = language
        self._owners: OrderedDict[str, str] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or pass on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        send = self._with_headers(request, send)
        try:
            body = await self._check(request)
        except _RefusedError as refused:
            body = self._refusal(request, refused)
        if isinstance(body, Response):
            await body(scope, receive, send)
        elif body is None:
            await self._app(scope, receive, send)
        else:
            await self._app(scope, _replayed(body, receive), send)

    def _refusal(self, request: Request, refused: _RefusedError) -> Response:
        """JSON, as Gradio's script wants it."""
        text = refused.text(language_of(request, self._language))
        return JSONResponse({"detail": text, "error": text}, refused.status)

    async def _check(self, request: Request) -> Response | bytes | None:
        """A response, the body that was read, or nothing if the request may pass as it is."""
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        if request.method in ("GET", "HEAD"):
            if not _GET.fullmatch(path):
                raise _RefusedError(404)
            session = request.query_params.get("session_hash", "")
            if "/heartbeat/" in path:
                session = path.rsplit("/", 1)[-1]
            if session:
                self._require_owner(session, client_of(request))
            return None
        if request.method != "POST" or not _POST.fullmatch(path):
            raise _RefusedError(404)
        client = client_of(request)
        if not client:
            raise _RefusedError(403, "no_cookie")
        if "/upload" in path:
            return await self._upload(request, client)
        body = await _read(request, _MAX_BODY_BYTES)
        self._check_body(body, client)
        return body

    def _check_body(self, body: bytes, client: str) -> None:
        """Values are text, numbers, yes or no: Gradio would fetch anything that names a file."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            raise _RefusedError(400) from None
        if not isinstance(content, dict) or not isinstance(content.get("session_hash"), str):
            raise _RefusedError(400)
        values = content.get("data") or []
        if not isinstance(values, list) or any(isinstance(v, list | dict) for v in values):
            raise _RefusedError(400, "plain_values")
        self._require_owner(content["session_hash"], client)

    def _require_owner(self, session: str, client: str) -> None:
        if not client:
            raise _RefusedError(403, "no_cookie")
        if len(session) > 64 or self._owners.setdefault(session, client) != client:
            raise _RefusedError(403, "not_yours")
        self._owners.move_to_end(session)
        if len(self._owners) > _MAX_SESSIONS_KNOWN:
            self._owners.popitem(last=False)

    async def _upload(self, request: Request, client: str) -> Response:
        # What surrounds the files in the request comes on top.
        body = await _read(request, MAX_UPLOAD_BYTES + _MAX_BODY_BYTES, "large_upload")
        again = Request(request.scope, _replayed(body, request.receive))
        try:
            async with again.form(max_files=1000, max_fields=0) as form:
                files = [f for f in form.getlist("files") if isinstance(f, UploadFile)]
                if len(files) > MAX_FILES:
                    raise _RefusedError(400, "many_images")
                if any((f.size or 0) > MAX_FILE_BYTES for f in files):
                    raise _RefusedError(413, "large_file")
                read = [(f.filename or "", await f.read()) for f in files]
        except (MultiPartException, HTTPException, KeyError, AssertionError):
            raise _RefusedError(400, "no_upload") from None
        return JSONResponse([self._uploads.add(client, name, content) for name, content in read])

    def _with_headers(self, request: Request, send: Send) -> Send:
        extra = list(_HEADERS)
        if request.method == "GET" and request.url.path.endswith("/") and not client_of(request):
            value = f"{COOKIE}={secrets.token_urlsafe(24)}; HttpOnly; SameSite=Lax; Path=/"
            extra.append((b"set-cookie", value.encode()))

        full = False

        async def sending(message: Message) -> None:
            nonlocal full
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *extra]
                full = message["status"] == 503
                if full:  # Gradio's script puts its own English in place of this status's text
                    response = self._refusal(request, _RefusedError(429, "busy"))
                    await response(request.scope, request.receive, send)
            if not full:
                await send(message)

        return sending


class _RefusedError(ToldError):
    def __init__(self, status: int, key: str = "refused", **values: object) -> None:
        super().__init__(key, **values)
        self.status = status


async def _read(request: Request, limit: int, key: str = "large_request") -> bytes:
    """The body, refused as soon as it passes the limit."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _RefusedError(413, key)
        parts.append(part)
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body first, then what the connection says."""
    first = True

    async def replay() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
