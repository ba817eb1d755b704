"""Measure in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lavis.common.errors import LavisError


class Memory:
    """This process' memory in bytes, from Linux' ``/proc``.

    Unlike ``ru_maxrss``, its peak is not inherited from the process that started this one.
    """

    def __init__(self) -> None:
        self._anonymous = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def restart(self) -> int:
        """Forget the peak of anonymous memory so far; return what there is now."""
        self._anonymous = now = status("RssAnon")
        return now

    def peaks(self, phase: str) -> dict[str, int]:
        """The largest values so far.

        ``<phase>_peak_bytes`` counts pages of mapped weight files too, which the system takes back
        when it needs them; ``<phase>_anonymous_bytes`` does not.
        """
        return {
            f"{phase}_peak_bytes": status("VmHWM"),
            f"{phase}_anonymous_bytes": self._anonymous,
        }

    def _sample(self) -> None:
        while True:
            self._anonymous = max(self._anonymous, status("RssAnon"))
            time.sleep(0.02)


def status(key: str, process: int | str = "self") -> int:
    """Bytes under a key of Linux' ``/proc/PROCESS/status``."""
    text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(text.partition(f"{key}:")[2].split()[0]) * 1024


def in_child(task: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a fresh process, which ends with this call.

    Raises:
        LavisError: the function raised one, or the process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, task, *args))
    child.start()
    sender.close()
    try:
        done, result = receiver.recv()
    except EOFError:
        child.join()
        raise LavisError(
            f"the measuring process died with status {child.exitcode}"
            + " (killed: most likely memory ran out)" * (child.exitcode == -signal.SIGKILL)
        ) from None
    finally:
        child.terminate()
        child.join()
    if not done:
        raise LavisError(result)
    return result


def _send(sender: Connection, task: Callable[..., Any], *args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    try:
        sender.send((True, task(*args)))
    except LavisError as error:
        sender.send((False, str(error)))
