"""Train: ``python train.py --cfg-path lavis/projects/instruction_tuning/train.yaml``."""

from __future__ import annotations

import argparse
import os
import time

from lavis.common.cli import run_cli, setup_logging
from lavis.common.config import add_config_arguments, load_config
from lavis.common.errors import ConfigError


def main() -> int:
    """Check everything that can be checked, then train, then print the last checkpoint's path."""
    parser = argparse.ArgumentParser(description="Train what a YAML file leaves unfrozen.")
    add_config_arguments(parser)
    args = parser.parse_args()
    setup_logging()

    config = load_config(args.cfg_path, args.options)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "training with several processes is not supported yet: start train.py alone"
        )

    from lavis.common.registry import RUNNERS, TASKS

    task_class = TASKS.get(config.run.task)
    task = task_class(config)
    task.check_paths()

    import torch

    from lavis.common.device import pick_device

    device = pick_device(config.run.device)
    dataset = task.build_datasets()
    torch.manual_seed(config.run.seed)
    model = task.build_model(device)
    job_id = time.strftime("%Y%m%d%H%M%S")
    runner = RUNNERS.get(config.run.runner)(config, task, model, dataset, job_id)
    checkpoint = runner.train()
    print(checkpoint)
    return 130 if runner.interrupted else 0


if __name__ == "__main__":
    run_cli(main)
