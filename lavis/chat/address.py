"""The address that a server listens on."""

from __future__ import annotations

import errno
import socket

from lavis.common.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there; the system's error if it cannot."""
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    # Connections inherit it: a token is sent at once, not when the one before is acknowledged.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def check_address(host: str, port: int) -> None:
    """Find out before the weights are loaded whether the address is free.

    Raises:
        ConfigError: it is not, or is no address of this machine.
    """
    advice = {
        errno.EADDRINUSE: "another program uses this port; choose another --port, or 0 for any",
        errno.EACCES: "ports below 1024 are the administrator's; choose one above",
        errno.EADDRNOTAVAIL: "this machine has no such address",
    }
    try:
        if not 0 <= port < 2**16:
            raise ConfigError(f"--port {port} cannot be used: ports are from 0 to 65535")
        with bind(host, port):
            pass
    except (OSError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        why = advice.get(number or 0, str(error))
        raise ConfigError(f"--host {host} --port {port} cannot be used: {why}") from error
