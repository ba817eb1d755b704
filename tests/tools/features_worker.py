"""``lavis.tools.cache_features``, killed after ``TEST_KILL_AFTER`` records (0: never)."""

from __future__ import annotations

import os
import signal
from typing import Any

from lavis.common.cli import run_cli
from lavis.datasets.feature_store import FeatureWriter
from lavis.tools.cache_features import main

_add, _left = FeatureWriter.add, [int(os.environ.get("TEST_KILL_AFTER", "0"))]


def _add_or_die(self: FeatureWriter, key: bytes, value: Any) -> None:
    _add(self, key, value)
    _left[0] -= 1
    if not _left[0]:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    FeatureWriter.add = _add_or_die  # type: ignore[method-assign]
    run_cli(main)
