"""What a card of 24 GB holds of language models of several sizes: ``python -m benchmarks.plan``.

A table of ``train.py --plan``'s numbers, from sizes alone: neither weights nor a card are needed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml

from lavis.common.config import load_config
from lavis.common.paths import TOYBOX
from lavis.models.compute.schedule import StepSchedule
from lavis.runners.estimate import Estimator
from lavis.runners.plan_page import GIB, USABLE
from lavis.runners.sharing import Sharing
from tests.processors.families import FAMILIES

QWEN = {"vocab_size": 151936, "seq_length": 8192}
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8,
    "max_position_embeddings": 40960, "dtype": "bfloat16", "architectures": ["Qwen3ForCausalLM"],
}  # fmt: skip
SIZES = {  # layers, width, width of the MLP, heads
    "Qwen-7B": (32, 4096, 22016, 32), "Qwen-14B": (40, 5120, 27392, 40),
    "Qwen3-4B": (36, 2560, 9728, 32), "Qwen3-8B": (36, 4096, 12288, 32),
    "Qwen3-14B": (40, 5120, 17408, 40),
}  # fmt: skip


def write(folder: Path, name: str) -> str:
    """The small files of a language model; returns its kind."""
    layers, width, mlp, heads = SIZES[name]
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp}
    sizes |= {"num_attention_heads": heads}
    folder.mkdir()
    first = name.startswith("Qwen-")
    if first:
        vocab = {"vocab_size": 152064} if name == "Qwen-14B" else {}
        content = QWEN | sizes | vocab
        shutil.copy(TOYBOX / "llm" / "qwen.tiktoken", folder)
    else:
        content = QWEN3 | sizes | {"tie_word_embeddings": name == "Qwen3-4B"}
        FAMILIES["qwen3"].save(folder)
    (folder / "config.json").write_text(json.dumps(content))
    return "qwen1" if first else "hf"


def row(name: str, *, features: bool, cards: int, memory: float) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        kind = write(Path(folder) / "llm", name)
        language = {"name": kind, "path": str(Path(folder) / "llm"), "grad_ckpt": True}
        file = Path(folder) / "run.yaml"
        run = {"amp": True, "autocast_dtype": "bf16", "max_tokens_per_batch": 4096}
        run |= {"strategy": "fsdp2"} if cards > 1 else {}
        model = {"arch": "vlm", "language": language, "train": {"connector": 1e-4}}
        file.write_text(yaml.safe_dump({"model": model, "run": run}))
        config = load_config(file)
        cache = replace(config.run.feature_cache, enabled=features)
        config = replace(config, run=replace(config.run, feature_cache=cache))
        made = Estimator(config, Sharing.fsdp2(cards) if cards > 1 else Sharing("single", 1))
    plain, again = StepSchedule(), StepSchedule(recompute="all")
    cells = [
        f"{made.held.total / GIB:.1f}",
        *(f"{made.longest(s, memory):,}" for s in (plain, again)),
    ]
    cells.append(f"{made.needed(4096, again) / GIB:.1f}")
    shown = "cached" if features else "in the step"
    return f"| {name} | {cards} | {shown} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--cards", type=int, default=1, help="by fsdp2, where there are several")
    parser.add_argument("--features", choices=["cached", "both"], default="both")
    parser.add_argument("--gib", type=float, default=24)
    args = parser.parse_args()
    print(
        "| language model | cards | features | weights | row, recompute none | row, all "
        "| 4,096, all |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in args.models:
        for features in (True, False) if args.features == "both" else (True,):
            memory = args.gib * GIB * USABLE
            print(row(name, features=features, cards=args.cards, memory=memory), flush=True)


if __name__ == "__main__":
    main()
