"""What another language model costs before it learns: one line of a YAML, and kept features.

``train.py`` runs four times until its first optimizer step is done: with the toybox's language
model and an empty feature cache; with the second one and the features that are there now; with the
second one and a cache that is empty again; and with the second one and no cache, where each step
encodes its own pictures. Vision encoder and pictures stay the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.process import in_child
from lavis.common.cli import output_file, positive, run_cli
from lavis.common.errors import LavisError
from lavis.common.paths import REPOSITORY

PROJECT = REPOSITORY / "lavis" / "projects" / "toybox" / "smollm2.yaml"
FIRST = "model.language={name: qwen1, path: examples/toybox/llm, precision: fp32}"
FILLED = "first model, features are encoded"
KEPT = "second model, features are kept"
EMPTY = "second model, features are encoded"
NO_CACHE = "second model, no feature cache"


class _FirstStepDone(BaseException):
    pass


def measure(second: Path, pictures: int, batch_size: int) -> dict[str, dict[str, float]]:
    """Seconds, and seconds of CPU of the training process, for each of the runs."""
    from examples.toybox.world.__main__ import write_split

    other = f"model.language={{name: hf, path: {second.resolve()}, precision: bf16}}"
    with tempfile.TemporaryDirectory(prefix="second_model_") as folder:
        write_split(Path(folder), "single", pictures, seed=0, languages=("en",))
        common = [
            f"env.cache_root={REPOSITORY}",
            f"datasets.toybox.build_info.annotations={{train: {{storage: {folder}/single.json}}}}",
            f"datasets.toybox.build_info.images.storage={folder}/image",
            f"run.output_dir={folder}/output",
            f"run.batch_size_train={batch_size}",
            "run.max_tokens_per_batch=null",
            "run.warmup_steps=0",
        ]
        kept, empty = (
            f"run.feature_cache={{enabled: true, dir: {folder}/{name}}}" for name in ("kept", "new")
        )
        runs = {
            FILLED: (FIRST, kept),
            KEPT: (other, kept),
            EMPTY: (other, empty),
            NO_CACHE: (other, "run.feature_cache={enabled: false}"),
        }
        return {
            name: in_child(until_first_step, [*common, *options], time.time())
            for name, options in runs.items()
        }


def until_first_step(options: Sequence[str], started: float) -> dict[str, float]:
    """Run ``train.py`` in this process until its first optimizer step is done.

    Args:
        started: of the process, in ``time.time``'s seconds.

    Raises:
        LavisError: ``train.py`` ended before.
    """
    from lavis.tasks.image_text_pretrain import ImageTextPretrainTask

    marks: list[tuple[float, float]] = []
    step = ImageTextPretrainTask.train_step

    def timed(*args: Any) -> Any:
        marks.append((time.time() - started, time.process_time()))
        if len(marks) == 2:  # what follows is the second step's
            raise _FirstStepDone
        return step(*args)

    ImageTextPretrainTask.train_step = timed  # type: ignore[method-assign]
    os.chdir(REPOSITORY)
    sys.argv = ["train.py", "--cfg-path", str(PROJECT), "--options", *options]
    import train

    try:
        train.main()
    except _FirstStepDone:
        (begin, begin_cpu), (end, end_cpu) = marks
        return {"begin_s": begin, "begin_cpu_s": begin_cpu, "end_s": end, "end_cpu_s": end_cpu}
    raise LavisError("train.py ended before its second step: give it more --pictures")


def table(numbers: dict[str, dict[str, float]]) -> str:
    """The numbers as text."""
    lines = [f"{'':36} {'first step begins':>20} {'first step done':>20}"]
    for name, found in numbers.items():
        cells = (
            f"{found[f'{at}_s']:.1f} s ({found[f'{at}_cpu_s']:.1f})" for at in ("begin", "end")
        )
        lines.append(f"{name:36} " + " ".join(f"{cell:>20}" for cell in cells))
    return "\n".join([*lines, "in brackets: of them, CPU time of the training process"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.second_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--language", type=Path, required=True, metavar="PATH",
        help="the second language model: a folder of Transformers or a .gguf file",
    )  # fmt: skip
    parser.add_argument("--pictures", type=positive, default=4000, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=4, help="default: %(default)s")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the numbers there too"
    )
    args = parser.parse_args(argv)
    numbers = measure(args.language, args.pictures, args.batch_size)
    print(table(numbers))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)
