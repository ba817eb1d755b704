"""Ctrl-C in a program that goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class CtrlC:
    """Breaks off what runs inside a ``with`` block of it, and is ignored elsewhere.

    A block raises ``KeyboardInterrupt`` once at most and is over with it. What is done then, such
    as saying so, cannot be hit by a second Ctrl-C.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        """Take what ends the work by itself, for an exception that gets lost in a destructor."""
        self._cancel = cancel
        self._armed = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Until the end of this block, in the main thread."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def __enter__(self) -> None:
        self._armed = True

    def __exit__(self, *error: object) -> None:
        self._armed = False

    def _handle(self, *signal_and_frame: Any) -> None:
        if self._armed:
            self._armed = False
            self._cancel()
            raise KeyboardInterrupt
