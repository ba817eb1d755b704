"""Memory of an export, beside the bytes of the folder that it writes.

A model of random weights, 1.6 GB in bf16, is written in the original's layout, exported as BLIP-2
in a process of its own, and reloaded and compared by another one, as always.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.process import Memory, in_child, status
from benchmarks.random_weights import SHAPES, claim, model_options, write_weights
from lavis.common.cli import gigabytes, output_file, run_cli

CHECKPOINT = "checkpoint_0.pth"


def prepare(shape: str, root: Path) -> int:
    """Write weights and a checkpoint; the bytes of the model's weights."""
    from lavis.models import load_model
    from lavis.models.weights.trained import trainable_state
    from lavis.runners.checkpoint import Checkpoint, Progress

    if claim(shape, root):
        write_weights(shape, root)
    options = model_options(SHAPES[shape], root)
    model = load_model("minigpt4qwen", "qwen7b_chat", options=options)
    state = trainable_state(model)
    Checkpoint(state, {}, {}, progress=Progress(1, 1)).write(root / CHECKPOINT)
    return sum(p.nbytes for p in model.parameters())


def export(shape: str, root: Path, limit: float) -> dict[str, Any]:
    """Export, and what it took."""
    from lavis.common.config import default_model_config
    from lavis.models.export.folder import Export

    config = default_model_config("minigpt4qwen", "qwen7b_chat", model_options(SHAPES[shape], root))
    made, out = Export.of(config, "blip2"), root / "out"
    checking = {"VmHWM": 0, "RssAnon": 0}

    def watch() -> None:
        """The process that reloads the folder."""
        while True:
            for file in Path("/proc/self/task").glob("*/children"):
                with suppress(OSError, IndexError, ValueError):  # it has just ended
                    for child in file.read_text(encoding="ascii").split():
                        for key, peak in checking.items():
                            checking[key] = max(peak, status(key, child))
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()
    memory, begun = Memory(), time.perf_counter()
    before = memory.restart()
    proof = made.write(root / CHECKPOINT, out, dtype=None, limit=limit, device="cpu")
    files = [path.stat().st_size for path in out.glob("*.safetensors")]
    return memory.peaks("export") | {
        "seconds": time.perf_counter() - begun,
        "before_bytes": before,
        "check_peak_bytes": checking["VmHWM"],
        "check_anonymous_bytes": checking["RssAnon"],
        "files": len(files),
        "files_bytes": sum(files),
        "largest_file_bytes": max(files),
        "proof": str(proof),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="medium", help="default: %(default)s")
    parser.add_argument("--max-shard-size", type=gigabytes, nargs="+", default=[0.5e9, 5e9],
                        metavar="GB", help="one export each (0.5 5)")  # fmt: skip
    parser.add_argument("--dir", type=Path, help="for weights and folder; default: a temporary one")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers there")
    args = parser.parse_args(argv)
    found = []
    for limit in args.max_shard_size:
        with tempfile.TemporaryDirectory(dir=args.dir) as root:
            model = in_child(prepare, args.shape, Path(root))
            found.append({"model_bytes": model} | in_child(export, args.shape, Path(root), limit))
        for name, value in found[-1].items():
            unit = f"{value / 1e9:.2f} GB" if name.endswith("_bytes") else value
            print(f"{name.removesuffix('_bytes'):18} {unit}")
        print()
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)
