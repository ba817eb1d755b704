"""The real model on this machine: loading, two steps of projector training, a short answer.

Random weights of the real sizes are written in the original's layout (18 GB for the full shape),
and a child process loads them through the public path, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.process import Memory, in_child
from benchmarks.random_weights import MARKER, SHAPES, claim, forget, model_options, write_weights
from lavis.common.cli import output_file, output_folder, run_cli, setup_logging
from lavis.common.config import AddOptions

if TYPE_CHECKING:
    from torch import Tensor

    from lavis.common.types import Batch
    from lavis.models import VLM

GIB = 1024**3
MAX_MEMORY = 24 * GIB  # the target machine
MAX_LOAD = 1.15  # peak of loading over the model's bytes
NEW_TOKENS = 8
QUESTION = "<Img><ImageHere></Img> 请仔细观察这张图片，描述其中的物体、颜色和它们的位置。"
ANSWER = (
    "图片里有一张木制的桌子，桌上放着一个红色的杯子和两本打开的书。窗外阳光明媚，远处可以看到"
    "绿色的山坡和一条小河。 A brown dog is lying under the table, looking at the person who took "
    "this picture; behind it there is a white wall with a small round clock on it."
)


def measure(shape_name: str, root: Path, options: list[str]) -> dict[str, Any]:
    """Load the model, train two steps, answer; return the numbers (bytes, seconds, FLOP/s)."""
    import torch

    from lavis.common.registry import MODELS
    from lavis.models import load_model

    setup_logging()
    MODELS.get("minigpt4qwen")  # imported now, so that loading counts no imports
    shape = SHAPES[shape_name]
    for path in (root / "ckpt").rglob("*.*"):
        forget(path)
    torch.manual_seed(0)
    memory = Memory()
    out: dict[str, Any] = {
        "shape": shape_name,
        "options": options,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    out |= matrix_speed(shape.matrix)
    report(f"bf16 matrix products: {_bf16_speeds(out)}; loading")
    started = time.perf_counter()
    model = load_model("minigpt4qwen", "qwen7b_chat", options=model_options(shape, root) + options)
    out["load_s"] = time.perf_counter() - started
    out["model_bytes"] = sum(p.nbytes for p in model.parameters())
    out |= memory.peaks("load")
    report(f"loaded in {out['load_s']:.1f} s; training two steps")
    out |= train_two_steps(model)
    out |= memory.peaks("train")
    report("answering")
    out |= answer(model)
    out |= memory.peaks("answer")
    out["step_share_of_bf16_peak"] = out["step_flop_per_s"] / out["mm_bf16_flop_per_s"]
    return out


def sample_batch(model: VLM) -> Batch:
    """One image of random pixels, a question and its answer, as the data loader gives them."""
    import torch
    from PIL import Image

    from lavis.common.types import Sample, Spans
    from lavis.datasets.collate import collate
    from lavis.processors.config import ImageEvalConfig
    from lavis.processors.conversation import Turn
    from lavis.processors.image import BlipImageEval

    noise = torch.randint(256, (480, 640, 3), dtype=torch.uint8).numpy()
    processor = BlipImageEval(
        ImageEvalConfig(name="blip_image_eval", image_size=model.config.image_size)
    )
    encoded = model.encoder.encode([Turn("user", QUESTION), Turn("assistant", ANSWER)])
    sample = Sample(
        sample_id="random",
        input_ids=torch.tensor(encoded.input_ids),
        labels=torch.tensor(encoded.labels),
        spans=Spans(processor(Image.fromarray(noise))[None]),
    )
    return collate([sample])


def train_two_steps(model: VLM) -> dict[str, Any]:
    """Two steps of the runner's kind; the first one also reads the weights from the disk."""
    import torch

    from lavis.common.optim import parameter_groups

    batch = sample_batch(model)
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), 0.05), lr=1e-4)
    out: dict[str, Any] = {"tokens": batch.num_tokens, "supervised": batch.num_supervised}
    out["step_flop"] = step_flop(model, batch)
    for step in ("first", "second"):
        started = time.perf_counter()
        output = model(batch)
        forward = time.perf_counter() - started
        loss = output.loss_sum / output.num_tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        out[f"{step}_step_s"] = time.perf_counter() - started
        out[f"{step}_forward_s"] = forward
        out[f"{step}_loss"] = loss.item()
        report(f"{step} step: {out[f'{step}_step_s']:.1f} s, loss {out[f'{step}_loss']:.4f}")
    out["tokens_per_s"] = batch.num_tokens / out["second_step_s"]
    out["step_flop_per_s"] = out["step_flop"] / out["second_step_s"]
    return out


def step_flop(model: VLM, batch: Batch) -> int:
    """Matrix products that a step cannot do without, in FLOP.

    The vision side runs forward; the language model forward and backward to its inputs, its head
    at supervised positions only. Attention scores (below 1 % at these lengths) are left out.
    """
    images, tokens = len(batch.spans.pixels), batch.num_tokens

    def weights(module: Any) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim > 1)

    vision = (
        images
        * model.vision.visual_encoder.pos_embed.shape[1]
        * weights(model.vision.visual_encoder.blocks)
    )
    queries = images * model.config.num_query_token
    vision += queries * (weights(model.vision.Qformer) + 2 * weights(model.connector))
    layers = tokens * weights(model.language.model.model.layers)
    return 2 * vision + 4 * (layers + batch.num_supervised * weights(model.language.model.lm_head))


def answer(model: VLM) -> dict[str, Any]:
    """Answer greedily; the first token's time includes the image and the question."""
    starts: list[float] = []
    hook = model.language.model.model.register_forward_pre_hook(
        lambda *_: starts.append(time.perf_counter())
    )
    pixels = sample_batch(model).spans.pixels
    model.eval()
    started = time.perf_counter()
    model.chat(QUESTION, None, pixels, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    ended = time.perf_counter()
    hook.remove()
    assert len(starts) == NEW_TOKENS
    return {
        "new_tokens": NEW_TOKENS,
        "first_token_s": starts[1] - started,
        "generated_tokens_per_s": (NEW_TOKENS - 1) / (ended - starts[1]),
    }


def matrix_speed(side: int) -> dict[str, float]:
    """Speed of square matrix products, in FLOP/s: the best of two.

    The second factor is transposed, as in a layer's forward pass; ``mm_bf16_backward`` (a quarter
    of the side, since it can be very slow) has it as in the gradient of a layer's input.
    """
    import torch

    def speed(a: Tensor, b: Tensor) -> float:
        seconds = math.inf
        for _ in range(2):
            started = time.perf_counter()
            torch.mm(a, b)
            seconds = min(seconds, time.perf_counter() - started)
        return 2 * len(a) ** 3 / seconds

    a = torch.randn(side, side)
    half = a.bfloat16()
    small = half[: side // 4, : side // 4].contiguous()
    return {
        "mm_bf16_flop_per_s": speed(half, half.t()),
        "mm_fp32_flop_per_s": speed(a, a.t()),
        "mm_bf16_backward_flop_per_s": speed(small, small),
    }


def table(r: dict[str, Any]) -> str:
    """The numbers as text."""
    size = r["model_bytes"]

    def memory(phase: str) -> str:
        peak, own = r[f"{phase}_peak_bytes"], r[f"{phase}_anonymous_bytes"]
        return f"{peak / GIB:.2f} GiB ({peak / size:.2f} x model), {own / GIB:.2f} without files"

    rows = {
        "model": f"{size / GIB:.2f} GiB",
        "loading": f"{r['load_s']:.1f} s",
        "peak, loading": memory("load"),
        "peak, training": memory("train"),
        "peak, answering": memory("answer"),
        "training sample": f"{r['tokens']} tokens, {r['supervised']} supervised",
        "first step": f"{r['first_step_s']:.2f} s (forward {r['first_forward_s']:.2f} s)",
        "second step": f"{r['second_step_s']:.2f} s (forward {r['second_forward_s']:.2f} s)",
        "training speed": f"{r['tokens_per_s']:.2f} tokens/s",
        "work of a step": f"{r['step_flop'] / 1e12:.3f} TFLOP, {_speed(r['step_flop_per_s'])}",
        "first new token": f"{r['first_token_s']:.2f} s",
        "next new tokens": f"{r['generated_tokens_per_s']:.2f} tokens/s",
        "bf16 matrix product": _bf16_speeds(r),
        "fp32 matrix product": _speed(r["mm_fp32_flop_per_s"]),
        "step / bf16 product": f"{r['step_share_of_bf16_peak']:.1%}",
    }
    return "\n".join(f"{name:20} {value}" for name, value in rows.items())


def _bf16_speeds(r: dict[str, Any]) -> str:
    forward, backward = r["mm_bf16_flop_per_s"], r["mm_bf16_backward_flop_per_s"]
    return f"{_speed(forward)}, in the backward pass' layout {_speed(backward)}"


def _speed(flop_per_s: float) -> str:
    return f"{flop_per_s / 1e9:.2f} GFLOP/s"


def missed(r: dict[str, Any]) -> list[str]:
    """Targets of the full size that were not met."""
    load = r["load_peak_bytes"] / r["model_bytes"]
    peak = max(r[f"{phase}_peak_bytes"] for phase in ("load", "train", "answer"))
    found = []
    if load > MAX_LOAD:
        found.append(f"loading took {load:.2f} x the model's bytes, not {MAX_LOAD} x at most")
    if peak > MAX_MEMORY:
        found.append(f"memory reached {peak / GIB:.1f} GiB, not {MAX_MEMORY / GIB:.0f} GiB at most")
    return found


def report(text: str) -> None:
    """Tell on standard error how far the run is."""
    print(f"full_size: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def weights_folder(shape_name: str, folder: Path | None, *, keep: bool) -> Iterator[Path]:
    """A folder with complete weights; what this run wrote is deleted at the end."""
    root = (folder or Path(tempfile.mkdtemp(prefix="full_size_"))).absolute()
    mine = False
    try:
        mine = claim(shape_name, root)
        if mine:
            report(f"writing weights to {root}")
            write_weights(shape_name, root)
        yield root
    finally:
        if mine and not keep:
            shutil.rmtree(root / "ckpt", ignore_errors=True)
            (root / MARKER).unlink(missing_ok=True)
        if folder is None and not any(root.iterdir()):
            root.rmdir()


def main(argv: Sequence[str] | None = None) -> int:
    """Write, measure and report; 1 if the full size misses a target."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="full", help="tiny: a check in seconds; default: full"
    )
    parser.add_argument(
        "--dir",
        type=output_folder,
        help="folder for the weights, by default a temporary one; complete ones are used again",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave what was written; otherwise it is deleted"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the numbers there too"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        action=AddOptions,
        default=[],
        metavar="KEY=VALUE",
        help="settings of the model, e.g. model.vit_precision=fp32 model.llm_grad_ckpt=true",
    )
    args = parser.parse_args(argv)
    with weights_folder(args.shape, args.dir, keep=args.keep) as root:
        numbers = in_child(measure, args.shape, root, args.options)
    print(table(numbers))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    failures = missed(numbers) if args.shape == "full" else []
    for failure in failures:
        report(f"target missed: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up then, too
    run_cli(main)
