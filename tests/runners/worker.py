"""What tests start as one process of several: runs of the toybox, one after the other.

``python -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.runners.worker RUNS
[CFG_PATH]``; RUNS is a JSON file with a list of lists of ``--options``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import train
from lavis.common import dist
from lavis.common.cli import run_cli, setup_logging

REPO = Path(__file__).resolve().parents[2]
PROJECT = REPO / "lavis" / "projects" / "toybox" / "train.yaml"


def options(data: Path) -> list[str]:
    """Settings that point the toybox's project at other pictures."""
    info = "datasets.toybox.build_info"
    return [
        f"env.cache_root={REPO}",
        *(f"{info}.annotations.{s}.storage={data / s}.json" for s in ("train", "val", "test")),
        f"{info}.images.storage={data / 'image'}",
        "run.num_workers=0",
        "run.log_freq=1",
        "run.warmup_steps=2",
        "run.batch_size_eval=16",
    ]


def main() -> int:
    """Call ``train.py``'s main once for each run, all in one process group."""
    setup_logging()
    torch.set_num_threads(1)
    path, *cfg_path = sys.argv[1:]
    status = 0
    with dist.process_group("cpu"):
        runs = json.loads(Path(path).read_text(encoding="utf-8"))
        for run in runs:
            sys.argv[1:] = ["--cfg-path", *(cfg_path or [str(PROJECT)]), "--options", *run]
            status = max(status, train.main())
    return status


if __name__ == "__main__":
    run_cli(main)
