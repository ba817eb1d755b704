"""Several conversations at once: their tokens in one pass, beside one conversation after another.

The model has random weights, and never ends an answer by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.chat import Bench, Job, report
from benchmarks.process import in_child
from benchmarks.random_model import SHAPES
from lavis.common.cli import output_file, positive, run_cli


def measure(job: Job) -> dict[str, Any]:
    """Tokens/s after each one's first, both ways in turns."""
    bench, rates, same = Bench(job), {"apart": list[float](), "together": list[float]()}, True
    for number in range(job.repeats):
        ids = {}
        for way, found in rates.items():
            answers = [begin(bench, i) for i in range(job.conversations)]
            threads = [threading.Thread(target=answer.read) for answer in answers]
            started = time.perf_counter()
            for thread in threads:
                thread.start()
                if way == "apart":
                    thread.join()
            for thread in threads:
                thread.join()
            tokens = sum(len(answer.ids) - 1 for answer in answers)
            found.append(tokens / (time.perf_counter() - started))
            ids[way] = [answer.ids for answer in answers]
        same &= ids["apart"] == ids["together"]
        report(f"{number + 1} of {job.repeats}: done")
    middle = {way: statistics.median(found) for way, found in rates.items()}
    return {"conversations": job.conversations, "tokens_per_s": middle, "same_tokens": same}


def begin(bench: Bench, number: int) -> Any:
    """An answer whose first token there is."""
    question, _ = bench.script[number % len(bench.script)]
    answer = bench.begin().ask(question, max_new_tokens=bench.job.new_tokens)
    next(answer)
    return answer


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="bench", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--visitors", type=positive, nargs="+", default=[2, 4, 8])
    parser.add_argument("--new-tokens", type=positive, default=32, help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=3, help="default: %(default)s")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers there")
    args = parser.parse_args(argv)
    results = []
    for visitors in args.visitors:
        job = Job(SHAPES[args.shape], args.device, 8, args.repeats, args.new_tokens, visitors)
        found = in_child(measure, job)
        apart, together = found["tokens_per_s"]["apart"], found["tokens_per_s"]["together"]
        print(
            f"{visitors} conversations: {apart:.1f} tokens/s one after another, {together:.1f} "
            f"together ({together / apart:.2f}x); tokens "
            f"{'are the same' if found['same_tokens'] else 'differ'}"
        )
        results.append(found)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)
