"""Serving the web page; nothing large is imported before it is served."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lavis.chat.address import bind
from lavis.common.errors import ConfigError

_PAGES = ("docs_url", "redoc_url", "openapi_url")
_NAMES = ("no_proxy", "NO_PROXY")


@contextmanager
def direct(hosts: str = "*") -> Iterator[None]:
    """Let the process reach ``hosts``, comma-separated, without the proxy of its environment.

    With ``*`` proxy variables are not even read, so that a malformed one or one whose protocol is
    not installed does no harm. Gradio makes connections when it is imported and asks its own page
    when it is launched.
    """
    before = {name: os.environ.get(name) for name in _NAMES}
    listed = next((value for value in before.values() if value), "")
    for name in _NAMES:
        os.environ[name] = hosts if hosts == "*" else f"{listed},{hosts}".strip(",")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def serve(
    demo: Any, guard: Any, host: str, port: int, *, share: bool, root_path: str, **looks: Any
) -> str:
    """Serve Gradio's page ``demo`` behind the middleware ``guard``; returns the address.

    Args:
        host: a name or an address, IPv6 with or without brackets.
        port: 0 is one that is free.
        share: also through a tunnel of Gradio's.
        root_path: where a reverse proxy shows the page, such as ``/chat``.
        looks: ``theme``, ``css`` and ``head`` of the page.

    Raises:
        ConfigError: the address cannot be used, or there is no tunnel.
    """
    import httpx

    bare = host.strip("[]")
    if port == 0:
        with bind(host, 0) as free:
            port = free.getsockname()[1]
    try:
        # A tunnel is asked for through the proxy, if there is one.
        with direct(f"localhost,{bare}" if share else "*"):
            _, address, shared = demo.launch(
                server_name=f"[{bare}]" if ":" in bare else bare, server_port=port,
                share=share, root_path=root_path or None, prevent_thread_lock=True, quiet=True,
                show_error=False, footer_links=[], run_history=False, enable_monitoring=False,
                mcp_server=False, ssr_mode=False, pwa=False, inbrowser=False,
                app_kwargs={"middleware": [guard], **dict.fromkeys(_PAGES)},
                **looks,
            )  # fmt: skip
    except (OSError, ValueError, ImportError, httpx.HTTPError) as error:
        advice = "; --share goes through the proxy of the environment" if share else ""
        raise ConfigError(f"cannot serve on {host}:{port}: {error}{advice}") from error
    if share and not shared:
        raise ConfigError("--share: there is no tunnel, see above; run it without --share")
    return str(shared or address)
