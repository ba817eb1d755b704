"""What every entry point shares: user errors without a traceback, a clean exit on Ctrl-C."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from lavis.common.errors import LavisError


def run_cli(main: Callable[[], int | None]) -> None:
    """Run ``main`` and exit: 2 for an error the user can mend, 130 for Ctrl-C."""
    try:
        status = main()
    except LavisError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        status = 1
    sys.exit(status)


def setup_logging(level: int = logging.INFO) -> None:
    """Log to standard error, leaving standard output to results."""
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    logging.captureWarnings(True)
