"""Ctrl-C and SIGTERM end a run after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopRequest:
    """Whether somebody asked the run to stop; ``name`` says who."""

    name: str = ""

    @property
    def requested(self) -> bool:
        """Whether to stop after the current step."""
        return bool(self.name)

    def requested_elsewhere(self) -> None:
        """Another process was asked."""
        self.name = self.name or "a signal to another process"

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM set :attr:`requested`; a second SIGINT ends the run now.

        A SIGTERM after the first signal asks for nothing new: it is how a launcher passes a Ctrl-C
        on that its processes have already got.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return

        def request_stop(number: int, frame: object) -> None:
            if self.requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.name = self.name or signal.Signals(number).name

        caught = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(s, request_stop) for s in caught]
        try:
            yield
        finally:
            for s, handler in zip(caught, before, strict=True):
                signal.signal(s, handler)
