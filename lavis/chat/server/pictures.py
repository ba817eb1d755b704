"""Pictures of requests: inside the request, or fetched from hosts that the operator lists."""

from __future__ import annotations

import base64
import binascii
import hashlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections import OrderedDict
from urllib.parse import SplitResult, urlsplit

from lavis.chat.engine import ChatEngine, ChatImage
from lavis.chat.server.protocol import ApiError
from lavis.common.errors import DataError
from lavis.common.images import FORMATS, as_image

_KEPT = 256  # encoded pictures
_FETCH_SECONDS = 10.0
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # any IPv4 address may be behind it


class Pictures:
    """Encoded pictures by what their files hold, so that the same one sent again is not encoded
    again and keeps its number: what was computed behind it can be used."""

    def __init__(
        self, engine: ChatEngine, *, max_pixels: int, max_bytes: int, hosts: frozenset[str]
    ) -> None:
        """Take the limits.

        Args:
            max_pixels: of a picture; looked up before it is decoded.
            max_bytes: of a file that is fetched.
            hosts: ``host`` or ``host:port`` that may be asked for pictures.
        """
        self._engine = engine
        self._max_pixels, self._max_bytes, self._hosts = max_pixels, max_bytes, hosts
        self._kept: OrderedDict[bytes, ChatImage] = OrderedDict()
        self._lock = threading.Lock()
        self._decoding = threading.Lock()  # one picture's pixels at a time: bounded memory

    def __call__(self, url: str, param: str) -> ChatImage:
        """The picture at ``url``, encoded.

        Args:
            param: where the request names it.

        Raises:
            ApiError: it cannot be had or read.
        """
        content = self._content(url, param)
        key = hashlib.sha256(content).digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        try:
            with self._decoding:
                picture = as_image(content, formats=FORMATS, max_pixels=self._max_pixels)
                image = self._engine.encode_image(picture)
        except DataError as error:
            raise ApiError(str(error), param=param, code="invalid_image") from error
        with self._lock:  # another request may have been first
            image = self._kept.setdefault(key, image)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return image

    def _content(self, url: str, param: str) -> bytes:
        if re.match("(?i)https?:", url):
            return self._fetch(url, param)
        head, comma, data = url.partition(",")
        if not comma or not re.fullmatch(r"(?i)data:image/[\w.+-]+;base64", head):
            raise ApiError(
                "a picture's url must be data:image/...;base64,... with the file's bytes"
                + (f", or on {', '.join(sorted(self._hosts))}" if self._hosts else "")
                + f", not {url[:60]!r}",
                param=param, code="invalid_image_url",
            )  # fmt: skip
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(
                f"the picture's bytes are no base64: {error}", param=param, code="invalid_image_url"
            ) from error

    def _fetch(self, url: str, param: str) -> bytes:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        except (ValueError, KeyError) as error:
            raise ApiError(f"no address: {error}", param=param, code="invalid_image_url") from error
        usual = port == _PORTS[parts.scheme]
        listed = f"{host}:{port}" in self._hosts or (usual and host in self._hosts)
        if not listed or parts.username is not None:
            raise ApiError(
                f"this server fetches no pictures from {host[:100]!r}: send the picture's bytes as "
                "data:image/...;base64,..., or have its operator start it with --allow-url-host",
                param=param, code="invalid_image_url",
            )  # fmt: skip
        try:
            return _get(parts, host, port, self._max_bytes)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ApiError(
                f"the picture at {url[:200]} cannot be fetched: {error}",
                param=param, code="invalid_image_url",
            ) from error  # fmt: skip


def _get(parts: SplitResult, host: str, port: int, max_bytes: int) -> bytes:
    """What is at an address, without a proxy and without following it elsewhere.

    Raises:
        OSError, ValueError, HTTPException: saying why not.
    """
    # The address that was checked is the one that is asked: a name may change in between.
    plain = socket.create_connection((_public_address(host, port), port), _FETCH_SECONDS)
    same = plain.dup()  # TLS takes the first one over
    late = threading.Event()

    def hang_up() -> None:
        late.set()  # before what is read ends
        same.shutdown(socket.SHUT_RDWR)

    end = threading.Timer(_FETCH_SECONDS, hang_up)
    end.daemon = True
    end.start()
    connection = http.client.HTTPConnection(host, port)
    try:
        secure = parts.scheme == "https"
        context = ssl.create_default_context() if secure else None
        connection.sock = context.wrap_socket(plain, server_hostname=host) if context else plain
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*"})
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(
                f"it answers {response.status}; addresses that lead elsewhere are not followed"
            )
        content = response.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise OSError(f"it is larger than {max_bytes / 1e6:.0f} MB")
        if late.is_set():
            raise OSError(f"it takes longer than {_FETCH_SECONDS:.0f} seconds")
        return content
    finally:
        end.cancel()
        connection.close()
        plain.close()
        same.close()


def _public_address(host: str, port: int) -> str:
    """An address of a host; refuses those inside this machine or its network.

    Raises:
        OSError: there is none, or one of them is not public.
    """
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        if not address.is_global or address.is_multicast or address in _NAT64:
            raise OSError(f"{host} is {text}, which is no public address")
    return found[0]
