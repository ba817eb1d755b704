"""Processes that work for another one, which alone decides when they end."""

from __future__ import annotations

import os
import signal
import sys
import threading


def leave_signals_to_parent(worker: int = 0) -> None:
    """For a data loader's worker: be deaf to Ctrl-C and SIGTERM, which reach the whole process
    group, so that the main process can finish its step and save.

    A SIGTERM that the parent itself sends is obeyed: it is how Python ends what still runs at its
    exit, where it then waits without a limit. Whoever's parent is gone, PyTorch's watchdog ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere nobody says who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
