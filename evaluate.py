"""Score a model: ``python evaluate.py --cfg-path run.yaml --checkpoint CKPT --splits test``.

Written answers again, without a model: ``python evaluate.py --score output/evaluation/test.jsonl``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lavis.common.cli import output_folder, positive, print_once, run_cli, setup_logging
from lavis.common.config import add_config_arguments, load_config
from lavis.common.errors import ConfigError
from lavis.common.paths import require_checkpoint, require_writable


def main() -> int:
    """Answer every question of some splits; write answers and a picture, print a table."""
    parser = argparse.ArgumentParser(description="Answer the questions of a split and score them.")
    add_config_arguments(parser, required=False)
    parser.add_argument("--checkpoint", help="trained projection; default: as the YAML builds it")
    parser.add_argument("--splits", nargs="+", action="extend", help="default: test")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N records of each"
    )
    parser.add_argument(
        "--baselines", action="store_true",
        help="also score shuffled images (blind) and an untrained projection",
    )  # fmt: skip
    parser.add_argument("--out", type=output_folder, help="folder; default: output/evaluation")
    parser.add_argument(
        "--score", nargs="+", action="extend", type=Path, metavar="JSONL",
        help="score answers that were written before; scores.json goes to --out, if that is given",
    )  # fmt: skip
    args = parser.parse_args()
    setup_logging()
    if args.score:
        for name in ("cfg_path", "options", "checkpoint", "splits", "limit", "baselines"):
            if getattr(args, name):
                parser.error(f"--score needs no model: leave --{name.replace('_', '-')} out")
        from lavis.tasks.evaluate import score_files

        print_once(score_files(args.score, args.out))
        return 0
    if args.cfg_path is None:
        parser.error("the following arguments are required: --cfg-path (or --score)")
    config = load_config(args.cfg_path, args.options)
    names = tuple(dict.fromkeys(args.splits or ["test"]))
    out = args.out or Path("output/evaluation")
    require_writable(out, "--out", ConfigError)
    if args.checkpoint is not None:
        args.checkpoint = require_checkpoint(args.checkpoint, "--checkpoint")

    import torch

    from lavis.common import dist
    from lavis.common.registry import TASKS
    from lavis.models.weights.files import open_pth
    from lavis.runners.launch import distributed
    from lavis.runners.prepare import log_notes, without_effect
    from lavis.tasks.data import RunData
    from lavis.tasks.evaluate import answer, evaluate

    task = TASKS.get(config.run.task)(config)
    task.check_paths(names)
    if args.checkpoint is not None:
        open_pth(args.checkpoint)
    with distributed(config.run) as device:
        log_notes(without_effect(config, answers=True))
        with dist.raise_together():
            data = RunData([], task.build_questions(names, args.limit))
        torch.manual_seed(config.run.seed)
        model = task.build_model(device, data, start=args.checkpoint is not None).eval()
        splits, run = data.evaluated, config.run
        untrained = {f"{split}, untrained": splits[split] for split in splits if args.baselines}
        before = {n: answer(model, parts, run, out, n) for n, parts in untrained.items()}
        if args.checkpoint is not None:
            model.load_checkpoint(args.checkpoint)
        print_once(evaluate(model, splits, run, out, blind=args.baselines, before=before))
    return 0


if __name__ == "__main__":
    run_cli(main)
