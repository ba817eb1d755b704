"""Train: ``python train.py --cfg-path lavis/projects/instruction_tuning/train.yaml``.

With several processes: ``python -m torch.distributed.run --nproc_per_node=4 train.py ...``.
"""

from __future__ import annotations

import argparse

from lavis.common.cli import print_once, run_cli, setup_logging
from lavis.common.config import add_config_arguments, load_config


def main() -> int:
    """Check everything that can be checked, then train, then print the last checkpoint's path."""
    parser = argparse.ArgumentParser(description="Train what a YAML file leaves unfrozen.")
    add_config_arguments(parser)
    parser.add_argument(
        "--use-deepspeed", action="store_true", help="short for --options run.strategy=deepspeed"
    )
    args = parser.parse_args()
    setup_logging()
    if args.use_deepspeed:
        args.options = [*args.options, "run.strategy=deepspeed"]
    config = load_config(args.cfg_path, args.options)

    from lavis.common.registry import RUNNERS, TASKS

    task = TASKS.get(config.run.task)(config)
    task.check_paths()

    import torch

    from lavis.common import dist
    from lavis.runners.launch import distributed, new_job_id

    with distributed(config.run) as device:
        if not config.run.evaluate:
            with dist.main_first():
                dataset = task.build_datasets()
        torch.manual_seed(config.run.seed)
        model = task.build_model(device)
        job_id = new_job_id(config.run)
        if config.run.evaluate:
            if config.run.resume_ckpt_path is not None:
                model.load_checkpoint(config.run.resume_ckpt_path)
            print_once(task.test(model, job_id))
            return 0
        runner = RUNNERS.get(config.run.runner)(config, task, model, dataset, job_id)
        checkpoint = runner.train()
        print_once(checkpoint)
        return 130 if runner.interrupted else 0


if __name__ == "__main__":
    run_cli(main)
