"""Encode the images of a run's data sets ahead of training; a second start encodes what is missing.

``python -m lavis.tools.cache_features --cfg-path run.yaml``, or in several processes with
``python -m torch.distributed.run --nproc_per_node=4 -m lavis.tools.cache_features ...``.
"""

from __future__ import annotations

import argparse

from lavis.common.cli import print_once, run_cli, setup_logging
from lavis.common.config import add_config_arguments, load_config


def main() -> int:
    """Check settings and files, encode what is missing, print what was done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--splits", nargs="+", action="extend", help="default: all that the run reads"
    )
    parser.add_argument(
        "--estimate", action="store_true", help="say what would be written, and encode nothing"
    )
    args = parser.parse_args()
    setup_logging()
    config = load_config(args.cfg_path, [*args.options, "run.feature_cache.enabled=true"])
    run = config.run
    watched = (*run.valid_splits, *run.test_splits)
    splits = dict.fromkeys(args.splits or [*run.train_splits, *watched])
    trained = [s for s in splits if s in run.train_splits]
    evaluated = [s for s in splits if s not in run.train_splits or s in watched]

    from lavis.common import dist
    from lavis.common.registry import TASKS
    from lavis.runners.launch import distributed
    from lavis.tasks.data import RunData

    task = TASKS.get(run.task)(config)
    task.check_paths(evaluated, trained)
    with distributed(run) as device:
        with dist.main_first():
            data = RunData(
                [task.build_split(split, train=True) for split in trained],
                {split: task.build_split(split, train=False) for split in evaluated},
            )
        counts = task.cache_features(data, device, estimate=args.estimate)
        folder = run.feature_cache.folder(config.env.cache_root)
        if not args.estimate:  # which has said what there is to say
            print_once(
                f"{counts.found} found, {counts.encoded} encoded, {counts.failed} failed: {folder}"
            )
    return 0


if __name__ == "__main__":
    run_cli(main)
