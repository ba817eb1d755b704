"""The toybox's world under its former name: ``python -m examples.toybox.world --out DIR``."""

from __future__ import annotations

import runpy
import sys

from lavis.common.paths import REPOSITORY

if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))  # examples/ comes with a clone, not with the package
    runpy.run_module("examples.toybox.world", run_name="__main__")
