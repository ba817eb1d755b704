"""What the training loop costs by itself: a model that does nothing beside the toybox's.

Both are trained by the same runner on the same pictures. The first has one parameter and a sum for
a forward pass, so its step is the data path and the bookkeeping alone. Shares are of the time that
the training process computes, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis.common.cli import output_file, positive, run_cli
from lavis.common.paths import REPOSITORY

if TYPE_CHECKING:
    from torch import nn

    from lavis.common.schema import Config
    from lavis.common.types import Batch

MAX_SHARE = 0.05  # of a real step
WARM_UP = 3  # steps that are not counted
PROJECT = REPOSITORY / "lavis" / "projects" / "toybox" / "train.yaml"


def measure(steps: int, repeats: int, workers: Sequence[int], batch_size: int) -> dict[str, Any]:
    """Train the one and the other in turns; return seconds of a step, the best of ``repeats``."""
    import torch

    from examples.toybox.world.__main__ import write_split
    from lavis.common.registry import TASKS

    out: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory(prefix="loop_") as folder:
        write_split(Path(folder), "train", (WARM_UP + steps) * batch_size, seed=0)
        configs = {n: _config(Path(folder), n, batch_size) for n in workers}
        task = TASKS.get("image_text_pretrain")(configs[workers[0]])
        dataset = task.build_datasets()
        model = task.build_model(torch.device("cpu"))
        jobs = {
            "memory": (configs[workers[0]], _stub(), [dataset[0, i] for i in range(len(dataset))]),
            **{f"loop_{n}": (configs[n], _stub(), dataset) for n in workers},
            **{f"step_{n}": (configs[n], model, dataset) for n in workers},
            "features": _with_features(Path(folder), workers[0], batch_size),
        }
        numbers = itertools.count()
        for name, job in list(jobs.items()) * repeats:
            wall, cpu = seconds_per_step(*job, job_id=f"{next(numbers)}")
            out[f"{name}_s"] = min(wall, out.get(f"{name}_s", wall))
            out[f"{name}_cpu_s"] = min(cpu, out.get(f"{name}_cpu_s", cpu))
            report(f"{name}: {wall * 1000:.1f} ms a step, {cpu * 1000:.1f} ms of them computing")
    for n in workers:
        out[f"share_{n}"] = out[f"loop_{n}_cpu_s"] / out[f"step_{n}_cpu_s"]
    out["share_memory"] = out["memory_cpu_s"] / out[f"step_{workers[0]}_cpu_s"]
    return out


def _with_features(folder: Path, workers: int, batch_size: int) -> tuple[Config, nn.Module, Any]:
    """The toybox's job through the feature cache, which is filled here."""
    import torch

    from lavis.common.registry import TASKS

    section = f"{{enabled: true, dir: {folder / 'features'}}}"
    config = _config(folder, workers, batch_size, f"run.feature_cache={section}")
    task = TASKS.get("image_text_pretrain")(config)
    dataset = task.build_datasets()
    return config, task.build_model(torch.device("cpu"), dataset), dataset


def seconds_per_step(
    config: Config, model: nn.Module, dataset: Any, *, job_id: str
) -> tuple[float, float]:
    """Train an epoch; the mean from one step's forward pass to the next one's.

    Returns:
        Time, and time that this process computed: loader processes and waiting are not in it.
    """
    from lavis.runners.runner_base import RunnerBase
    from lavis.tasks.image_text_pretrain import ImageTextPretrainTask

    starts: list[tuple[float, float]] = []

    class TimedTask(ImageTextPretrainTask):
        def train_step(self, model: nn.Module, batch: Batch) -> Any:
            starts.append((time.perf_counter(), time.process_time()))
            return super().train_step(model, batch)

    if isinstance(dataset, list):
        dataset = _InMemory(dataset)
    runner = RunnerBase(config, TimedTask(config), model, dataset, job_id)
    runner.train()
    if runner.interrupted:
        raise KeyboardInterrupt
    count = len(starts) - 1 - WARM_UP
    wall, cpu = ((b - a) / count for a, b in zip(starts[WARM_UP], starts[-1], strict=True))
    return wall, cpu


class _InMemory:
    """Samples that are ready, by ``(epoch, index)``."""

    def __init__(self, samples: list[Any]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self._samples[key[1]]


def _stub() -> nn.Module:
    from torch import nn

    from lavis.models.step import LossOutput

    class Stub(nn.Module):
        """One parameter, which learns nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.connector = nn.Linear(1, 1, bias=False)  # a name that a checkpoint may hold

        def forward(self, batch: Batch) -> LossOutput:
            loss = self.connector.weight.sum() * batch.num_supervised
            return LossOutput(loss, batch.num_supervised)

        def training_flops(self, tokens: int, images: int) -> float:
            return float(tokens + images)

    return Stub()


def _config(folder: Path, workers: int, batch_size: int, *options: str) -> Config:
    from lavis.common.config import load_config

    info = "datasets.toybox.build_info"
    return load_config(
        PROJECT,
        [
            f"env.cache_root={REPOSITORY}",
            f"{info}.annotations.train.storage={folder / 'train.json'}",
            f"{info}.images.storage={folder / 'image'}",
            f"run.output_dir={folder / 'output'}",
            f"run.num_workers={workers}",
            f"run.batch_size_train={batch_size}",
            "run.warmup_steps=1",
            *options,
        ],
    )


def table(r: dict[str, Any], workers: Sequence[int]) -> str:
    """The numbers as text."""
    jobs = [(f"num_workers {n}", f"loop_{n}", f"step_{n}", f"share_{n}") for n in workers]
    jobs.append(("samples in memory", "memory", f"step_{workers[0]}", "share_memory"))
    rows = [("", "loop alone", "computing", "toybox step", "computing", "share")]
    for title, loop, step, share in jobs:
        seconds = [r[f"{name}{kind}_s"] for name in (loop, step) for kind in ("", "_cpu")]
        shown = [_speed(s) if i % 2 == 0 else f"{s * 1000:.1f} ms" for i, s in enumerate(seconds)]
        rows.append((title, *shown, f"{r[share]:.1%}"))
    text = "\n".join(f"{a:18} {b:>23} {c:>9} {d:>23} {e:>9} {f:>6}" for a, b, c, d, e, f in rows)
    text += (
        f"\n{'feature cache':18} {'':23} {'':9} {_speed(r['features_s']):>23} "
        f"{r['features_cpu_s'] * 1000:>6.1f} ms"
    )
    threads = f"{r['threads']} thread" + "s" * (r["threads"] > 1)
    return f"{text}\n{r['batch_size']} samples a step, {threads}, torch {r['torch']}"


def _speed(seconds: float) -> str:
    return f"{1 / seconds:.1f} steps/s ({seconds * 1000:.1f} ms)"


def report(text: str) -> None:
    """Tell on standard error how far the run is."""
    print(f"loop: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; 1 if the loop's share of a step misses its target."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=40, help="default: %(default)s")
    parser.add_argument(
        "--repeats", type=positive, default=3, help="the best one counts; default: %(default)s"
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, nargs="+", action="extend", help="run.num_workers; default: 0 1"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the numbers there too"
    )
    args = parser.parse_args(argv)
    args.workers = args.workers or [0, 1]
    numbers = measure(args.steps, args.repeats, args.workers, args.batch_size)
    print(table(numbers, args.workers))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    missed = [n for n in args.workers if numbers[f"share_{n}"] > MAX_SHARE]
    for n in missed:
        share = numbers[f"share_{n}"]
        report(f"target missed: num_workers {n}: {share:.1%} of a step, not {MAX_SHARE:.0%}")
    return 1 if missed else 0


if __name__ == "__main__":
    run_cli(main)
