"""Encode the images of a run's data sets ahead of training; a second start encodes what is missing.

``python -m lavis.tools.cache_features --cfg-path run.yaml``, or in several processes with
``python -m torch.distributed.run --nproc_per_node=4 -m lavis.tools.cache_features ...``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lavis.common.cli import print_once, run_cli, setup_logging
from lavis.common.config import add_config_arguments, load_stages
from lavis.common.schema import RunConfig
from lavis.common.stages import in_stage, select_stages


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
    parser.add_argument("--stage", metavar="NAME", help="only of this one of the YAML's stages")
    args = parser.parse_args()
    setup_logging()
    stages = load_stages(args.cfg_path, [*args.options, "run.feature_cache.enabled=true"])
    stages = select_stages(stages, args.stage)

    from lavis.common import dist
    from lavis.common.registry import TASKS
    from lavis.runners.launch import distributed
    from lavis.tasks.data import RunData

    tasks = {name: TASKS.get(config.run.task)(config) for name, config in stages.items()}
    for name, config in stages.items():
        with in_stage(name):
            tasks[name].check_paths(*reversed(splits_of(config.run, args.splits)))
    with distributed([*stages.values()][-1].run) as device:
        for name, config in stages.items():
            task, run = tasks[name], config.run
            trained, evaluated = splits_of(run, args.splits)
            with in_stage(name):
                with dist.main_first():
                    data = RunData(
                        [task.build_split(split, train=True) for split in trained],
                        {split: task.build_split(split, train=False) for split in evaluated},
                    )
                counts = task.cache_features(data, device, estimate=args.estimate)
            folder = run.feature_cache.folder(config.env.cache_root)
            if not args.estimate:  # which has said what there is to say
                print_once(
                    f"{f'stage {name}: ' if name else ''}{counts.found} found, {counts.encoded} "
                    f"encoded, {counts.failed} failed: {folder}"
                )
    return 0


def splits_of(run: RunConfig, asked: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Splits whose training samples are encoded, and those that are encoded as evaluated."""
    watched = (*run.valid_splits, *run.test_splits)
    splits = dict.fromkeys(asked or [*run.train_splits, *watched])
    trained = [s for s in splits if s in run.train_splits]
    return trained, [s for s in splits if s not in run.train_splits or s in watched]


if __name__ == "__main__":
    run_cli(main)
