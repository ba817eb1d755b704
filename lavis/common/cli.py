"""What every entry point shares: user errors without a traceback, a clean exit on Ctrl-C."""

from __future__ import annotations

import argparse
import codecs
import io
import logging
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

from lavis.common.config import add_config_arguments
from lavis.common.errors import ConfigError, LavisError
from lavis.common.packages import check_packages
from lavis.common.paths import REPOSITORY, TOYBOX, require_writable, user_path


def run_cli(main: Callable[[], int | None]) -> None:
    """Run ``main`` and exit: 2 for an error the user can mend, 130 for Ctrl-C.

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
            own = stream.isatty() and not ascii_only
            stream.reconfigure(encoding=None if own else "utf-8", errors="replace")
    try:
        check_packages()
        status = main()
    except LavisError as error:
        where = "" if is_main_process() else f" (process {os.environ['RANK']})"
        if not (where and error.agreed):
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
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"
        else c
        for c in text
    )


def positive(text: str) -> int:
    """The type of an argument that counts something: an integer from 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


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


def _output(*, directory: bool) -> Callable[[str], Path]:
    def check(text: str) -> Path:
        path = user_path(text)
        try:
            require_writable(path, "", ConfigError, directory=directory)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return path

    return check


output_folder, output_file = _output(directory=True), _output(directory=False)
"""Types of arguments that name what is written: a wrong one is refused before anything is done."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model a command talks to; without any, the toybox."""
    add_config_arguments(parser, required=False)
    parser.add_argument("--model-type", help="qwen7b_chat (default), qwen14b_chat or toybox")
    parser.add_argument(
        "--checkpoint", "--checkpoint-path", "-c", metavar="PTH",
        help="trained projection; without it and --cfg-path, the toybox of this repository answers",
    )  # fmt: skip


def resolve_model_arguments(args: argparse.Namespace) -> bool:
    """Fill in what :func:`add_model_arguments` left open.

    Returns:
        Whether the toybox was chosen because nothing else was named.

    Raises:
        ConfigError: a configuration or a model type without a checkpoint.
    """
    if args.checkpoint is None and (args.cfg_path or args.model_type):
        named = "--cfg-path" if args.cfg_path else "--model-type"
        raise ConfigError(f"{named} needs --checkpoint: the projection that was trained for it")
    toybox = args.checkpoint is None
    if toybox:
        args.model_type = "toybox"
        args.checkpoint = str(TOYBOX / "checkpoint.pth")
        print(
            f"Answering with the toybox ({TOYBOX.relative_to(REPOSITORY)}), a tiny model of "
            "coloured shapes; --checkpoint PTH [--cfg-path YAML] loads real weights.",
            file=sys.stderr,
        )
    if args.cfg_path is None:
        args.model_type = args.model_type or "qwen7b_chat"
    return toybox
