"""Train: ``python train.py --cfg-path lavis/projects/instruction_tuning/train.yaml``.

With several processes: ``python -m torch.distributed.run --nproc_per_node=4 train.py ...``.
"""

from __future__ import annotations

import argparse

from lavis.common.cli import print_once, run_cli, setup_logging
from lavis.common.config import AddOptions, add_config_arguments, load_config


def main() -> int:
    """Check everything that can be checked, then train, then print the last checkpoint's path."""
    parser = argparse.ArgumentParser(description="Train what a YAML file leaves unfrozen.")
    add_config_arguments(parser)
    parser.add_argument(
        "--use-deepspeed", dest="options", action=AddOptions, nargs=0,
        const=["run.strategy=deepspeed"], help="short for --options run.strategy=deepspeed",
    )  # fmt: skip
    args = parser.parse_args()
    setup_logging()
    config = load_config(args.cfg_path, args.options)

    from lavis.common.registry import RUNNERS, TASKS

    task = TASKS.get(config.run.task)(config)
    task.check_paths()

    import torch

    from lavis.common import dist
    from lavis.runners.launch import distributed, new_job_id
    from lavis.runners.prepare import RunPlan, log_notes, without_effect

    with distributed(config.run) as device:
        with dist.main_first():
            dataset = task.build_datasets()
        plan = None if config.run.evaluate else RunPlan.of(config, dataset, device)
        answers = config.run.evaluate or bool(config.run.test_splits)
        log_notes(without_effect(config, answers=answers))
        torch.manual_seed(config.run.seed)
        model = task.build_model(device)
        job_id = new_job_id(config.run)
        if config.run.evaluate:
            if config.run.resume_ckpt_path is not None:
                model.load_checkpoint(config.run.resume_ckpt_path)
            print_once(task.test(model, job_id))
            return 0
        runner = RUNNERS.get(config.run.runner)(config, task, model, dataset, job_id, plan)
        checkpoint = runner.train()
        print_once(checkpoint)
        return 130 if runner.interrupted else 0


if __name__ == "__main__":
    run_cli(main)
