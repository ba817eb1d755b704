"""Train: ``python train.py --cfg-path lavis/projects/instruction_tuning/train.yaml``.

With several processes: ``python -m torch.distributed.run --nproc_per_node=4 train.py ...``.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from lavis.common.cli import print_once, run_cli, setup_logging
from lavis.common.config import AddOptions, add_config_arguments, load_stages
from lavis.common.stages import in_stage, select_stages


def main() -> int:
    """Check everything that can be checked, then train, then print the last checkpoint's path."""
    parser = argparse.ArgumentParser(description="Train what a YAML file leaves unfrozen.")
    add_config_arguments(parser)
    parser.add_argument(
        "--use-deepspeed", dest="options", action=AddOptions, nargs=0,
        const=["run.strategy=deepspeed"], help="short for --options run.strategy=deepspeed",
    )  # fmt: skip
    parser.add_argument(
        "--plan", nargs="?", const="rtx3090", metavar="CARD",
        help="say what the run needs on a card, its longest packed row and its hours, and train "
        "nothing: needs neither weights nor a GPU. CARD is a name (rtx3090, the default, a100, "
        "...) or gigabytes; start it by torch.distributed.run for several cards",
    )  # fmt: skip
    parser.add_argument("--stage", metavar="NAME", help="train only this one of the YAML's stages")
    args = parser.parse_args()
    setup_logging(logging.WARNING if args.plan else logging.INFO)
    stages = load_stages(args.cfg_path, args.options)
    chosen = select_stages(stages, args.stage)
    config = [*chosen.values()][-1]
    run = config.run

    from lavis.common.registry import RUNNERS, TASKS

    if args.plan:
        from lavis.runners.plan_page import card, plan_run

        for name, each in chosen.items():
            with in_stage(name):
                page = plan_run(each, TASKS.get(each.run.task)(each), card(args.plan))
            print_once(f"stage {name}\n{page}\n" if name else page)
        return 0
    if "" not in stages and not run.evaluate:
        from lavis.runners.stages import train_stages

        checkpoint, interrupted = train_stages(stages, args.stage)
        print_once(checkpoint)
        return 130 if interrupted else 0
    task = TASKS.get(run.task)(config)
    task.check_paths()

    import torch

    from lavis.common import dist
    from lavis.runners.launch import distributed, new_job_id
    from lavis.runners.prepare import RunPlan, log_notes, without_effect
    from lavis.tasks.evaluate import evaluate

    with distributed(run) as device:
        with dist.main_first():
            data = task.build_datasets()
        plan = None if run.evaluate else RunPlan.of(config, data, device)
        log_notes(without_effect(config, answers=run.evaluate or bool(run.test_splits)))
        torch.manual_seed(run.seed)
        mapped = plan is not None and plan.strategy.shards
        start = plan is not None or run.resume_ckpt_path is not None
        model = task.build_model(device, data, mapped=mapped, start=start)
        job_id = new_job_id(run)
        if run.evaluate:
            if run.resume_ckpt_path is not None:
                model.load_checkpoint(run.resume_ckpt_path)
            out = Path(run.output_dir) / job_id / "evaluation"
            print_once(evaluate(model.eval(), data.evaluated, run, out))
            return 0
        runner = RUNNERS.get(run.runner)(config, task, model, data, job_id, plan)
        checkpoint = runner.train()
        print_once(checkpoint)
        return 130 if runner.interrupted else 0


if __name__ == "__main__":
    run_cli(main)
