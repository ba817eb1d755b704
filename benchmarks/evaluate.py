"""Questions a second: answers that make room for the next, beside batches that wait.

Both sides take turns on the questions of one split. Answers that differ are counted: in half
precision a batch of another size rounds otherwise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis.common.cli import output_file, positive, run_cli
from lavis.common.config import add_config_arguments, load_config
from lavis.common.paths import TOYBOX, require_checkpoint

if TYPE_CHECKING:
    from lavis.datasets.instruction import InstructionDataset
    from lavis.models.vlm import VLM

WAIT, REFILL = "one batch after the other", "refilled"


class Bench:
    """The model and its questions."""

    def __init__(self, cfg_path: Path, options: Sequence[str], checkpoint: str, limit: int) -> None:
        import torch

        from lavis.common.registry import TASKS
        from lavis.tasks.data import RunData

        config = load_config(cfg_path, options)
        task: Any = TASKS.get(config.run.task)(config)
        data = RunData([], task.build_questions(("test",), limit))
        self.run = config.run
        self.model: VLM = task.build_model(torch.device("cpu"), data, start=True).eval()
        self.model.load_checkpoint(checkpoint)
        self.dataset: InstructionDataset = data.evaluated["test"][0]

    def answer(self, side: str) -> tuple[list[str], float, float]:
        """Answers, and the seconds that passed, by the clock and on the CPU."""
        from lavis.tasks.scoring import predict

        language = self.model.language
        language.caches, caches = language.caches and side == REFILL, language.caches
        clock, cpu = time.perf_counter(), time.process_time()
        try:
            found = predict(
                self.model,
                self.dataset,
                batch_size=self.run.batch_size_eval,
                max_new_tokens=self.run.max_new_tokens,
            )
        finally:
            language.caches = caches
        took = time.perf_counter() - clock, time.process_time() - cpu
        return [p.answer for p in found], *took


def measure(bench: Bench, repeats: int) -> dict[str, Any]:
    """Questions a second of each side, its best round, and how many answers differ."""
    best: dict[str, list[float]] = {}
    said: dict[str, list[str]] = {}
    for side in [WAIT, REFILL] * repeats:
        said[side], *took = bench.answer(side)
        best[side] = [min(pair) for pair in zip(took, best.get(side, took), strict=True)]
    count = len(bench.dataset)
    speeds = {f"{side}, q/s": count / clock for side, (clock, _) in best.items()}
    speeds |= {f"{side}, q/CPU-s": count / cpu for side, (_, cpu) in best.items()}
    differ = sum(a != b for a, b in zip(said[WAIT], said[REFILL], strict=True))
    return {"questions": count, **speeds, "answers that differ": differ}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--checkpoint", default=str(TOYBOX / "checkpoint.pth"))
    parser.add_argument("--limit", type=positive, default=2000, help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=2, help="default: %(default)s")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    args = parser.parse_args(argv)
    checkpoint = str(require_checkpoint(args.checkpoint, "--checkpoint"))
    numbers = measure(Bench(args.cfg_path, args.options, checkpoint, args.limit), args.repeats)
    for name, value in numbers.items():
        print(f"{name:<40} {value:>8.1f}" if isinstance(value, float) else f"{name:<40} {value:>8}")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)
