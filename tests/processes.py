"""Processes that tests start, forked from one that has imported all that is heavy.

Several are started by PyTorch's own launcher, which forks them, too, and watches over them as over
any. They share the seed of Python's hashes, which processes that begin from nothing do not.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

REPO = Path(__file__).resolve().parent.parent
SECONDS = 300  # no process of a test takes longer
# DeepSpeed is not among them: it changes the process that imports it.
HEAVY = [
    "torch.distributed.run", "torch.distributed.fsdp", "torch.utils.tensorboard", "sacrebleu",
    "matplotlib.figure", "lavis.runners.launch", "lavis.runners.runner_base",
    "lavis.datasets.builders", "lavis.tasks.evaluate", "lavis.tasks.image_text_pretrain",
    "lavis.models.vision.eva_qformer", "lavis.models.language.qwen1",
]  # fmt: skip
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(HEAVY)


class Running:
    """``python -m MODULE ARGUMENT...`` in the background, of which no process survives ``wait``.

    Args:
        logs: a folder that gets what is said, to standard output and to standard error.
        processes: more than one are started by ``torch.distributed.run``.
        anew: nothing is forked: by ``python -m torch.distributed.run`` as a user has it.
    """

    def __init__(
        self,
        logs: Path,
        module: str,
        arguments: Sequence[object],
        processes: int = 1,
        *,
        anew: bool = False,
        **env: str,
    ) -> None:
        name = str(time.monotonic_ns())
        self.streams = [logs / f"{name}.{stream}" for stream in ("out", "err")]
        words = [module, *map(str, arguments)]
        variables = os.environ | {"DS_ACCELERATOR": "cpu"} | env
        self._process = _server.Process(
            target=_begin, args=(words, processes, anew, variables, self.streams)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def ended(self) -> bool:
        return not self._process.is_alive()

    def wait(self) -> CompletedProcess[str]:
        """What it said and the status it ended with."""
        self._process.join(SECONDS)
        status = self._process.exitcode
        self.kill()
        assert status is not None, f"not done in {SECONDS} s\n{self.said()}"
        return CompletedProcess([], status, *(path.read_text() for path in self.streams))

    def said(self) -> str:
        return "".join(path.read_text() for path in self.streams if path.exists())

    def kill(self) -> None:
        """SIGKILL to the launcher, its processes and their workers."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.join()

    def family(self) -> list[int]:
        """It, its children, their children."""
        return _family(self.pid)


def run(
    logs: Path, module: str, arguments: Sequence[object], processes: int = 1, **env: str
) -> CompletedProcess[str]:
    """``Running`` until its end."""
    return Running(logs, module, arguments, processes, **env).wait()


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in _family(int(child)))]


def _begin(
    words: list[str], processes: int, anew: bool, env: dict[str, str], streams: list[Path]
) -> None:
    os.setsid()  # a signal to the group is not one to the tests
    os.chdir(REPO)
    os.environ.clear()
    os.environ.update(env)
    for path, stream in zip(streams, (sys.stdout, sys.stderr), strict=True):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    if processes == 1:
        sys.argv = ["", *words]
        _work()
        return
    launch = ["--standalone", f"--nproc-per-node={processes}"]
    if anew:
        command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", *words]
        os.execv(command[0], command)
    from torch.distributed.run import main

    main([*launch, "--run-path", "--start-method=fork", __file__, *words])


def _work() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's is inherited
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _work()
