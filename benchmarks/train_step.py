"""The training step of the frozen regime, one saving after the other, with random weights.

Every rung computes the same optimizer step of the projection: same samples, same loss, same
gradient, up to rounding. Time is measured in one process, in which the rungs take turns; memory in
a process for each rung. Shares of the CPU's peak mean something only where nothing else computes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.process import Memory, in_child
from benchmarks.random_model import SHAPES, Shape, build_model, draw_samples
from lavis.common.cli import output_file, positive, run_cli
from lavis.common.errors import LavisError

if TYPE_CHECKING:
    from torch import Tensor

    from lavis.common.types import Batch, Sample

GIB = 1024**3
_PLAIN = {"packed_attention": False, "prefix_cache": False, "supervised_head": False}


@dataclass(frozen=True)
class Rung:
    """One more saving than the rung before.

    Attributes:
        title: what is added.
        schedule: fields of ``StepSchedule``.
        recompute: whether the reference's schedule recomputes its layers.
        packed: micro-batches are packed to the token budget, rather than one sample each.
        cached: Q-Former outputs are given.
    """

    title: str
    schedule: dict[str, Any] = field(default_factory=dict)
    recompute: bool = True
    packed: bool = False
    cached: bool = False


RUNGS = {
    "reference": Rung("reference", {"reference": True}),
    "recompute": Rung("+ no recomputation", {"reference": True}, recompute=False),
    "padding": Rung("+ no padding", _PLAIN),
    "head": Rung("+ supervised-only head", _PLAIN | {"supervised_head": True}),
    "packing": Rung("+ packing, masked square", _PLAIN | {"supervised_head": True}, packed=True),
    "documents": Rung("+ attention per document", {"prefix_cache": False}, packed=True),
    "prefix": Rung("+ constant prefix once", packed=True),
    "features": Rung("+ features once", packed=True, cached=True),
    "compile": Rung("+ compiled layers", {"compile": True}, packed=True, cached=True),
}


@dataclass(frozen=True)
class Job:
    """What is measured, as the measuring processes get it."""

    shape: Shape
    device: str
    samples: int
    budget: int
    repeats: int
    limit_s: float


class Bench:
    """The model, its samples, and one optimizer step of them at any rung."""

    def __init__(self, job: Job) -> None:
        import torch

        from lavis.common.device import pick_device

        torch.manual_seed(0)
        self.job = job
        self.device = pick_device(job.device)
        self.model = build_model(job.shape, self.device)
        self.samples = draw_samples(self.model, job.shape, job.samples)
        projection = self.model.connector
        self.optimizer = torch.optim.AdamW(projection.parameters(), lr=1e-4)
        self._start = [p.detach().clone() for p in projection.parameters()]
        self._cached: list[Sample] = []

    def prepare(self, rung: Rung) -> list[Batch]:
        """Set the model to a rung; return the step's micro-batches."""
        from lavis.models.compute.schedule import StepSchedule

        for layer in self.model.language.model.model.layers:
            layer._compiled_call_impl = None
        self.model.set_schedule(StepSchedule(**rung.schedule))
        if not rung.recompute:
            self.model.language.model.activation_checkpointing_disable()
        if not self.model.schedule.reference:
            self.model.constant_prefix()  # once in a run, so not in the first step's numbers
        vars(self.model).pop("encode_query", None)
        samples = self.samples
        if rung.cached:
            if not self._cached:
                self._cached = [self._with_features(s) for s in samples]
            samples = self._cached
            vars(self.model)["encode_query"] = lambda features: features
        return micro_batches(samples, rung, self.job.budget)

    def step(self, batches: list[Batch]) -> tuple[float, Tensor]:
        """Compute a step from the same projection each time; loss per token, gradient."""
        import torch

        parameters = list(self.model.connector.parameters())
        with torch.no_grad():
            for p, start in zip(parameters, self._start, strict=True):
                p.copy_(start)
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(b.num_supervised for b in batches)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            part = self.model(batch).loss_sum / tokens
            part.backward()
            loss += part.detach()
        self.optimizer.step()
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        return loss.item(), gradient.float().cpu()

    def seconds(self, batches: list[Batch]) -> tuple[float, float, Tensor]:
        """Time a step; with its loss and gradient."""
        from lavis.common.device import synchronize

        synchronize(self.device)
        started = time.perf_counter()
        loss, gradient = self.step(batches)
        synchronize(self.device)
        return time.perf_counter() - started, loss, gradient

    def _with_features(self, sample: Sample) -> Sample:
        from lavis.common.types import Spans

        features = self.model.encode_query(sample.spans.pixels.to(self.device))
        return dataclasses.replace(sample, spans=Spans(features.cpu()))


def micro_batches(samples: list[Sample], rung: Rung, budget: int) -> list[Batch]:
    """The step's samples as the runner would group them."""
    from lavis.datasets.collate import collate
    from lavis.datasets.plan import BatchPlan

    plan = BatchPlan(
        sizes=(len(samples),),
        samples_per_step=len(samples),
        batch_size=1,
        seed=0,
        lengths=tuple(len(s.input_ids) for s in samples),
        max_tokens=budget if rung.packed else None,
    )
    (step,) = plan.micro_batches(0)
    return [collate([samples[i] for _, i in micro]) for micro in step]


def measure_time(job: Job, names: list[str]) -> dict[str, Any]:
    """Rungs in turns, forth and back, until there are enough repeats or the time is over."""
    bench = Bench(job)
    found = _facts(bench)
    deadline = time.monotonic() + job.limit_s
    for name in names:
        batches = bench.prepare(RUNGS[name])
        found[name] = first_step(bench, RUNGS[name], batches)
        report(f"{name}: ready")
    for turn in range(job.repeats):
        if turn and time.monotonic() > deadline:
            report(f"the time is over after {turn} of {job.repeats} repeats")
            break
        for name in names if turn % 2 == 0 else reversed(names):
            batches = bench.prepare(RUNGS[name])
            if RUNGS[name].schedule.get("compile"):
                bench.step(batches)
            found[name]["seconds"].append(bench.seconds(batches)[0])
            report(f"{name}: {found[name]['seconds'][-1]:.2f} s")
    found["peak_flop_per_s"] = max(found["peak_flop_per_s"], matrix_peak(bench))
    return found


def measure_memory(job: Job, name: str) -> dict[str, Any]:
    """A single step: its memory over the weights, and the other numbers too."""
    import torch

    cuda = job.device.startswith("cuda")
    bench = Bench(job)
    found = _facts(bench)
    batches = bench.prepare(RUNGS[name])
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
    else:
        memory = Memory()
        before = memory.restart()
    with _flop_counter() as counter:
        seconds, loss, gradient = bench.seconds(batches)
    peak = (
        torch.cuda.max_memory_allocated(bench.device)
        if cuda
        else memory.peaks("step")["step_anonymous_bytes"]
    )
    report(f"{name}: {seconds:.2f} s, {(peak - before) / GIB:.2f} GiB over the weights")
    found[name] = {
        "flops": counter.get_total_flops(),
        "seconds": [seconds],
        "loss": loss,
        "gradient": gradient.numpy(),
        "micro_batches": len(batches),
        "memory_bytes": peak - before,
    }
    return found


def _facts(bench: Bench) -> dict[str, Any]:
    import torch

    lengths = [len(s.input_ids) for s in bench.samples]
    cuda = bench.device.type == "cuda"
    return {
        "weights_bytes": sum(p.nbytes for p in bench.model.parameters()),
        "tokens": lengths,
        "supervised": sum(b.num_supervised for b in bench.prepare(RUNGS["reference"])),
        "useful_flops": useful_flops(bench),
        "peak_flop_per_s": matrix_peak(bench),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name(bench.device)
        if cuda
        else torch.backends.cpu.get_cpu_capability(),
    }


def useful_flops(bench: Bench) -> float:
    """What the loss and the projection's gradient cannot be had without.

    Tokens after the constant prefix go through the layers forward and backward to their inputs,
    supervised positions through the head; attention sees the prefix (whose keys and values need no
    gradient) and what is before in its document. Nothing of the vision side, nothing twice. A
    multiply-add counts two.
    """
    from lavis.common.types import IGNORE_INDEX

    model = bench.model
    llm = model.language.model
    prefix = len(model.encoder.constant_prefix()[0])
    layers = sum(p.numel() for p in llm.model.layers.parameters() if p.ndim > 1)
    width, depth = llm.config.hidden_size, llm.config.num_hidden_layers
    total = 0.0
    for sample in bench.samples:
        own = len(sample.input_ids) - prefix
        total += 4 * own * layers
        total += width * depth * (8 * own * prefix + 12 * own * (own + 1) / 2)
        supervised = int((sample.labels[1 + prefix :] != IGNORE_INDEX).sum())
        total += 4 * supervised * llm.lm_head.weight.numel()
        total += 4 * model.config.num_query_token * model.connector.weight.numel()
    return total


def first_step(bench: Bench, rung: Rung, batches: list[Batch]) -> dict[str, Any]:
    """Loss, gradient, and the FLOP of matrix products and attention, masked scores included.

    Compiled layers compute what they compute without.
    """
    compiled = rung.schedule.get("compile")
    if compiled:
        bench.prepare(dataclasses.replace(rung, schedule={}))
    with _flop_counter() as counter:
        loss, gradient = bench.step(batches)
    if compiled:
        bench.prepare(rung)
        loss, gradient = bench.step(batches)
    return {
        "flops": counter.get_total_flops(),
        "seconds": [],
        "loss": loss,
        "gradient": gradient.numpy(),
        "micro_batches": len(batches),
    }


def _flop_counter() -> Any:
    import torch
    from torch.utils import flop_counter as fc

    def forward(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return int(fc.sdpa_flop_count(q, k, v))

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return int(fc.sdpa_backward_flop_count(grad, q, k, v))

    aten = torch.ops.aten
    return fc.FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


def matrix_peak(bench: Bench) -> float:
    """FLOP/s of the best square matrix product in the language model's precision."""
    from lavis.common.device import matmul_peak

    dtype = bench.model.language.model.lm_head.weight.dtype
    return max(matmul_peak(bench.device, dtype, size) for size in bench.job.shape.matrix)


def measure(job: Job, names: list[str]) -> dict[str, Any]:
    """All numbers of the chosen rungs."""
    found: dict[str, Any] = {} if job.shape.single else in_child(measure_time, job, names)
    for name in names:
        one = in_child(measure_memory, job, name)
        rung = {**one.pop(name), **found.get(name, {})}
        peak = max(one["peak_flop_per_s"], found.get("peak_flop_per_s", 0))
        found = {**one, **found, name: rung, "peak_flop_per_s": peak}
    first = found[names[0]]
    rungs = []
    for name in names:
        rung = found.pop(name)
        rung["name"], rung["title"] = name, RUNGS[name].title
        rung["best_s"], rung["median_s"] = min(rung["seconds"]), statistics.median(rung["seconds"])
        rung["samples_per_s"] = job.samples / rung["best_s"]
        rung["speedup"] = first["best_s"] / rung["best_s"] if rung is not first else 1.0
        useful = found["useful_flops"]
        rung["useful_share_of_peak"] = useful / rung["best_s"] / found["peak_flop_per_s"]
        rung["flops_over_useful"] = rung["flops"] / useful
        rung["loss_difference"] = abs(rung["loss"] - first["loss"]) / abs(first["loss"])
        rung["gradient_difference"] = _distance(rung["gradient"], first["gradient"])
        rungs.append(rung)
    for rung in rungs:
        del rung["gradient"]
    job_facts = {k: v for k, v in vars(job).items() if k != "shape"}
    return {**job_facts, "precision": job.shape.precision, **found, "rungs": rungs}


def _distance(a: Any, b: Any) -> float:
    import numpy as np

    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def table(r: dict[str, Any]) -> str:
    """The numbers as text."""
    heads = ("", "samples/s", "speed", "memory", "useful", "done", "loss", "gradient")
    under = ("", "", "x first", "GiB", "of peak", "x useful", "differs", "differs")
    rows = [heads, under] + [
        (
            rung["title"],
            f"{rung['samples_per_s']:.3g}",
            f"{rung['speedup']:.2f}",
            f"{rung['memory_bytes'] / GIB:.2f}",
            f"{rung['useful_share_of_peak']:.1%}",
            f"{rung['flops_over_useful']:.2f}",
            f"{rung['loss_difference']:.0e}",
            f"{rung['gradient_difference']:.0e}",
        )
        for rung in r["rungs"]
    ]
    text = "\n".join(f"{row[0]:26}" + "".join(f"{x:>11}" for x in row[1:]) for row in rows)
    lengths = r["tokens"]
    return (
        f"{text}\n{len(lengths)} samples of {min(lengths)} to {max(lengths)} tokens, "
        f"{sum(lengths)} in all, {r['supervised']} supervised; useful: "
        f"{r['useful_flops'] / 1e12:.3f} TFLOP\n{r['precision']} matrix product "
        f"{r['peak_flop_per_s'] / 1e9:.0f} GFLOP/s on {r['processor']}, {r['threads']} threads, "
        f"torch {r['torch']}; weights {r['weights_bytes'] / GIB:.2f} GiB"
    )


def draw(r: dict[str, Any], path: Path) -> None:
    """Draw samples/s of each rung."""
    from matplotlib.figure import Figure

    rungs = r["rungs"]
    figure = Figure(figsize=(8, 1 + 0.42 * len(rungs)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([x["title"] for x in rungs], [x["samples_per_s"] for x in rungs], height=0.65)
    labels = [
        f"{x['speedup']:.1f} x, {x['memory_bytes'] / GIB:.2f} GiB, "
        f"{x['useful_share_of_peak']:.0%} of peak"
        for x in rungs
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=1.5 * max(x["samples_per_s"] for x in rungs))
    axes.set(xlabel="samples/s (memory: over the weights; peak: of a matrix product)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=120)


def report(text: str) -> None:
    """Tell on standard error how far the run is."""
    print(f"train_step: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="bench",
        help="bench: 12 layers 1024 wide; 7b: Qwen-7B-Chat and ViT-g, each rung once; "
        "tiny: a check in seconds; default: %(default)s",
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--only", nargs="+", action="extend", choices=RUNGS, metavar="NAME", help=", ".join(RUNGS)
    )
    parser.add_argument("--compile", action="store_true", help="the last rung too")
    parser.add_argument("--samples", type=positive, help="of a step; default: 16, or 1 for 7b")
    parser.add_argument(
        "--budget",
        type=positive,
        default=1024,
        help="tokens of a micro-batch; default: %(default)s",
    )
    parser.add_argument(
        "--repeats", type=positive, default=3, help="the best one counts; default: %(default)s"
    )
    parser.add_argument(
        "--limit", type=float, default=math.inf, metavar="S", help="no new repeat after S seconds"
    )
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), help="of frozen weights; default: the shape's"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the numbers there too"
    )
    parser.add_argument(
        "--picture", type=output_file, metavar="FILE", help="draw samples/s of each rung"
    )
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape]
    if args.precision:
        shape = dataclasses.replace(shape, precision=args.precision)
    chosen = args.only or (["reference", "features"] if shape.single else list(RUNGS)[:-1])
    names = [n for n in RUNGS if n in chosen or (n == "compile" and args.compile)]
    samples = args.samples or shape.samples
    if args.repeats < 1 or samples < 1:
        raise LavisError("--repeats and --samples are 1 at least")
    job = Job(shape, args.device, samples, args.budget, args.repeats, args.limit)
    numbers = measure(job, names)
    print(table(numbers))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if args.picture:
        draw(numbers, args.picture)
    return 0


if __name__ == "__main__":
    run_cli(main)
