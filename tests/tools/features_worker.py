"""``lavis.tools.cache_features`` killed after ``TEST_KILL_AFTER`` features, each a shard."""

from __future__ import annotations

import os
import signal
from typing import Any

from lavis.common.cli import run_cli
from lavis.datasets import feature_store
from lavis.datasets.feature_store import FeatureStore
from lavis.tools.cache_features import main

_add, _left = FeatureStore.add, [int(os.environ.get("TEST_KILL_AFTER", "0"))]  # 0: never


def _add_or_die(self: FeatureStore, key: bytes, value: Any) -> None:
    _add(self, key, value)
    _left[0] -= 1
    if not _left[0]:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if _left[0]:
        feature_store._BYTES = 1
    FeatureStore.add = _add_or_die  # type: ignore[method-assign]
    run_cli(main)
