"""What stands between the network and Gradio: few routes, plain values, uploads with an owner."""

from __future__ import annotations

import json
import re
import secrets
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lavis.chat.web.texts import LIMITS, VisitorError, language_of

MAX_FILES = LIMITS["files"]
MAX_FILE_BYTES = LIMITS["file_mb"] * 10**6
MAX_UPLOAD_BYTES = LIMITS["upload_mb"] * 10**6
_MAX_BODY_BYTES = 256_000
_MAX_PENDING = 32
_MAX_SESSIONS_KNOWN = 10_000

COOKIE = "lavis_chat"
_CLIENT = re.compile(r"[\w-]{22,64}")
# What Gradio's own script asks for; whatever a release adds stays closed.
_GET = re.compile(
    r"/|/config/?|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/(assets|static|svelte)/.+|"
    r"/gradio_api/(startup-events|app_id|theme\.css|queue/data|upload_progress|heartbeat/[^/]+)"
)
_POST = re.compile(r"/gradio_api/(queue/join|cancel|run/[^/]+|upload|reset)/?")

# Gradio's page needs inline scripts; nothing may come from, or go to, another host.
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


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


class Guard(BaseHTTPMiddleware):
    """Stands in front of Gradio.

    Gradio serves more than this page uses: files, a proxy to other hosts, the REST interface,
    recordings, run history. All of that answers 404. A session belongs to the browser that
    began it.
    """

    def __init__(self, app: ASGIApp, uploads: Uploads, language: str = "auto") -> None:
        """Stand before ``app``; ``language`` of refusals is the page's."""
        super().__init__(app)
        self._uploads = uploads
        self._language = language
        self._owners: OrderedDict[str, str] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The page has no websockets."""
        if scope["type"] != "websocket":
            await super().__call__(scope, receive, send)

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Answer, refuse, or pass on."""
        try:
            response = await self._check(request) or await call_next(request)
            if response.status_code == 503:  # Gradio's script puts English in place of its text
                raise _RefusedError(429, "busy")
        except _RefusedError as refused:  # as JSON, which Gradio's script wants
            text = refused.text(language_of(request, self._language))
            response = JSONResponse({"detail": text, "error": text}, refused.status)
        response.headers.update(_HEADERS)
        if request.method == "GET" and request.url.path.endswith("/") and not client_of(request):
            response.set_cookie(COOKIE, secrets.token_urlsafe(24), httponly=True, samesite="lax")
        return response

    async def _check(self, request: Request) -> Response | None:
        """A response, or nothing if the request may pass."""
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        client = client_of(request)
        if request.method in ("GET", "HEAD") and _GET.fullmatch(path):
            session = request.query_params.get("session_hash", "")
            if "/heartbeat/" in path:
                session = path.rsplit("/", 1)[-1]
            if session:
                self._require_owner(session, client)
            return None
        if request.method != "POST" or not _POST.fullmatch(path):
            raise _RefusedError(404)
        if not client:
            raise _RefusedError(403, "no_cookie")
        if "/upload" in path:
            return await self._upload(request, client)
        _require_length(request, _MAX_BODY_BYTES)
        self._check_body(await request.body(), client)
        return None

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
        _require_length(request, MAX_UPLOAD_BYTES + _MAX_BODY_BYTES, "large_upload")
        try:
            async with request.form(max_files=1000, max_fields=0) as form:
                files = [f for f in form.getlist("files") if isinstance(f, UploadFile)]
                if len(files) > MAX_FILES:
                    raise _RefusedError(400, "many_images")
                if any((f.size or 0) > MAX_FILE_BYTES for f in files):
                    raise _RefusedError(413, "large_file")
                read = [(f.filename or "", await f.read()) for f in files]
        except (MultiPartException, HTTPException, KeyError, AssertionError):
            raise _RefusedError(400, "no_upload") from None
        return JSONResponse([self._uploads.add(client, name, content) for name, content in read])


class _RefusedError(VisitorError):
    def __init__(self, status: int, key: str = "refused") -> None:
        super().__init__(key)
        self.status = status


def _require_length(request: Request, limit: int, key: str = "large_request") -> None:
    """Refuse a body that is too long, or whose length is not said in advance as browsers do."""
    length = request.headers.get("content-length", "")
    chunked = "transfer-encoding" in request.headers
    if chunked or not re.fullmatch(r"[0-9]{1,12}", length) or int(length) > limit:
        raise _RefusedError(413, key)
