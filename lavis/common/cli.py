"""What every entry point shares: user errors without a traceback, a clean exit on Ctrl-C."""

from __future__ import annotations

import argparse
import codecs
import io
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lavis.common.errors import ConfigError, LavisError
from lavis.common.packages import check_packages
from lavis.common.paths import require_writable, user_path


def run_cli(main: Callable[[], int | None]) -> None:
    """Run ``main`` and exit: 2 for an error the user can mend, 130 for Ctrl-C.

    A GPU's memory is handed out in segments that grow, unless ``PYTORCH_ALLOC_CONF`` is set:
    packed batches and conversations are of ever other sizes, which leave gaps in fixed ones.

    Packages of untried versions are refused first: an older Transformers takes this package's
    calls without a word and computes something else.

    What goes to a file or a pipe is UTF-8, whatever the locale says. A terminal gets what it can
    show.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started us closed it
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            ascii_only = codecs.lookup(stream.encoding).name == "ascii"
            keep = stream.isatty() and not ascii_only
            stream.reconfigure(encoding=None if keep else "utf-8", errors="replace")
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        check_packages()
        status = main()
    except LavisError as error:
        where = "" if is_main_process() else f" (process {os.environ['RANK']})"
        if where and error.agreed:
            time.sleep(1)  # the launcher ends all once one has ended: the main one speaks first
        else:
            print(f"error{where}: {printable(str(error))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        status = 1
    sys.exit(status)


def printable(text: str) -> str:
    """Text without control characters, which must not steer the terminal, and lone surrogates,
    which no stream can write: it may be an answer or a file name."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an argument; refuses what is wrong before PyTorch is imported."""

    def parse(text: str) -> int:
        message = f"must be an integer from {least} to 2^63 - 1, not {text!r}"
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(message) from error
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(message)
        return value

    return parse


positive = whole_number(1)


def gigabytes(text: str) -> float:
    """The type of an argument that says how much memory: bytes, out of GB."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of GB over 0, not {text!r}")
    return value * 1e9


def is_main_process() -> bool:
    """Whether this process speaks to the user, as the launcher's environment has it."""
    return os.environ.get("RANK", "0") == "0"


def print_once(result: object) -> None:
    """Print a command's result, in one of its processes."""
    if is_main_process():
        print(result, flush=True)


def setup_logging(level: int = logging.INFO) -> None:
    """Log to standard error, leaving standard output to results.

    Of several processes, only the main one reports progress; the others warn.
    """
    if not is_main_process():
        level = max(level, logging.WARNING)
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    logging.captureWarnings(True)


def _output(text: str, *, directory: bool) -> Path:
    path = user_path(text)
    try:
        require_writable(path, "", ConfigError, directory=directory)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


output_folder, output_file = partial(_output, directory=True), partial(_output, directory=False)
"""Types of arguments that name what is written: a wrong one is refused before anything is done."""
