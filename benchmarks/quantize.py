"""A frozen language model in few bits beside itself in bf16 and fp32: memory, speed, exactness.

As at the start of training, the soft tokens of a random linear connector stand in packed rows
between texts, and the connector learns. Loss and gradient are compared with those in fp32, of which
bf16 shows how much rounding alone moves them: very far, were there no text before the soft tokens.
All models take turns in one process. Memory while loading is measured in a process for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.process import Memory, in_child
from lavis.common.cli import output_file, positive, run_cli

if TYPE_CHECKING:
    from torch import Tensor

    from lavis.models.language.causal import CausalLM

KINDS = ("fp32", "bf16", "int8", "nf4", "gguf")
FEATURES = (32, 768)  # of an image
BEFORE = "Here is a picture, and then a text that describes it."
TEXTS = (
    "A dog lies under the table and sleeps. There is a red bowl beside it, and the bowl is empty.",
    "The picture shows a street in winter. Two people walk along the houses; one of them carries "
    "an umbrella, although it does not snow.",
    "In the middle there is a large blue square. A small green circle lies to the left of it.",
    "Three boats are on the lake. The nearest one is white and has a sail; nobody is on board.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--language", type=Path, required=True,
        help="folder of Transformers, or .gguf file; of the latter, bf16, int8 and nf4 are made of "
        "its unpacked weights",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=output_file, help="write all numbers")
    args = parser.parse_args(arguments)
    kinds = KINDS if args.language.suffix == ".gguf" else KINDS[:-1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = unpacked(args.language, Path(scratch))
        paths = {k: args.language if k == "gguf" else folder for k in kinds}
        numbers = {k: in_child(loading, k, paths[k], args.device) for k in kinds}
        models = {k: load(k, paths[k], args.device) for k in kinds}
        steps = compare(models, documents(args.language, models["bf16"]), args.repeats)
        numbers = {k: numbers[k] | steps[k] for k in kinds}
    for kind in kinds:
        print(row(kind, numbers[kind], numbers))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


def unpacked(language: Path, scratch: Path) -> Path:
    """A folder of bf16 weights, written if there is only a ``.gguf`` file."""
    import torch

    from lavis.models.language.hf import load_hf

    if language.suffix != ".gguf":
        return language
    dense = load_hf(language, device=torch.device("cpu"), dtype=torch.bfloat16)
    dense.model.save_pretrained(scratch)
    return scratch


def load(kind: str, path: Path, device: str) -> CausalLM:
    """One of the models; what is not packed is bf16, or fp32 in the model of that name."""
    import torch

    from lavis.models.compute.cpu import widen_frozen_linears
    from lavis.models.language.hf import load_hf

    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    packed = None if kind in ("fp32", "bf16") else kind
    llm = load_hf(path, device=torch.device(device), dtype=dtype, quantized=packed)
    widen_frozen_linears(llm.requires_grad_(False))
    return llm


def loading(kind: str, path: Path, device: str) -> dict[str, Any]:
    """Bytes of a model, and the peak of anonymous memory while it was loaded."""
    import torch

    import lavis.models.language.hf  # noqa: F401  so that no import counts

    torch.ones(8, 8) @ torch.ones(8, 8)
    memory = Memory()
    before = memory.restart()
    llm = load(kind, path, device)
    peak = memory.peaks("load")["load_anonymous_bytes"] - before
    layers = {id(t): t for b in llm.blocks() for t in (*b.parameters(), *b.buffers())}
    everything = {id(t): t for t in (*llm.parameters(), *llm.buffers())}
    return {
        "layer_bytes": sum(t.nbytes for t in layers.values()),
        "bytes": sum(t.nbytes for t in everything.values()),
        "load_anonymous_bytes": peak,
    }


def documents(language: Path, llm: CausalLM) -> list[Tensor]:
    """Ids of what stands before an image, and of some texts; random without a tokenizer."""
    import torch

    from lavis.common.errors import LavisError
    from lavis.processors.hf_tokenizer import FastTokenizer

    try:
        tokenizer = FastTokenizer.load(language, llm.vocab_size)
    except LavisError:
        draw = torch.Generator().manual_seed(0)
        return [torch.randint(llm.vocab_size, (n,), generator=draw) for n in (12, 20, 31, 26)]
    return [torch.tensor(tokenizer.encode(t)) for t in (BEFORE, *TEXTS)]


def compare(
    models: dict[str, CausalLM], texts: list[Tensor], repeats: int
) -> dict[str, dict[str, Any]]:
    """Loss a token, the connector's gradient beside that in fp32, and tokens/s of a step."""
    import torch

    torch.manual_seed(0)
    llm = models["fp32"]
    features = torch.randn(len(texts) - 1, *FEATURES)
    connector = torch.nn.Linear(FEATURES[1], llm.width)
    std = float(llm.model.get_input_embeddings().weight.float().std())
    torch.nn.init.normal_(connector.weight, std=std / FEATURES[1] ** 0.5)
    times: dict[str, list[float]] = {k: [] for k in models}
    results: dict[str, tuple[float, Tensor]] = {}
    for _ in range(repeats + 1):  # the first one warms up
        for kind, model in models.items():
            begin = time.perf_counter()
            results[kind] = step(model, connector, features, texts)
            times[kind].append(time.perf_counter() - begin)
    tokens = sum(len(texts[0]) + FEATURES[0] + len(t) for t in texts[1:])
    grad = results["fp32"][1]
    return {
        kind: {
            "loss": loss,
            "cosine": float(torch.cosine_similarity(g, grad, dim=0)),
            "gradient_norm": float(g.norm() / grad.norm()),
            "tokens_per_second": tokens / statistics.median(times[kind][1:]),
        }
        for kind, (loss, g) in results.items()
    }


def step(
    llm: CausalLM, connector: Any, features: Tensor, texts: list[Tensor]
) -> tuple[float, Tensor]:
    """Mean loss of the texts after their images, and the gradient of the connector's weight."""
    import torch

    from lavis.models.compute.masks import Documents

    device = llm.head.weight.device
    connector.to(device).zero_grad(set_to_none=True)
    soft = connector(features.to(device)).to(llm.head.weight.dtype)
    before, *texts = (t.to(device) for t in texts)
    first = len(before) + FEATURES[0]
    lengths = tuple(first + len(t) for t in texts)
    pairs = zip(soft, texts, strict=True)
    rows = [x for s, t in pairs for x in (llm.embed(before[None])[0], s, llm.embed(t[None])[0])]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    hidden = llm.hidden(torch.cat(rows)[None], positions, documents=Documents(lengths))[0]
    ends = [h[first - 1 : -1] for h in hidden.split(lengths)]  # each says the next token
    loss = llm.loss(torch.cat(ends), torch.cat(texts)) / sum(map(len, texts))
    loss.backward()
    return loss.item(), connector.weight.grad.flatten().clone()


def row(kind: str, n: dict[str, Any], numbers: dict[str, dict[str, Any]]) -> str:
    """A line of the table."""
    speed = n["tokens_per_second"] / numbers["bf16"]["tokens_per_second"]
    return (
        f"{kind:5}{n['layer_bytes'] / 1e6:9.1f} MB of layers{n['bytes'] / 1e6:9.1f} MB in all"
        f"{n['load_anonymous_bytes'] / 1e6:8.1f} MB to load"
        f"{n['tokens_per_second']:8.1f} tokens/s ({speed:.2f} of bf16)  loss {n['loss']:.4f} "
        f"({n['loss'] - numbers['fp32']['loss']:+.4f})  gradient: cosine {n['cosine']:.4f}, "
        f"length {n['gradient_norm']:.3f}"
    )


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
