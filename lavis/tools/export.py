"""Write what was trained in a format that others read.

``python -m lavis.tools.export --checkpoint checkpoint.pth --format blip2 --out folder`` writes the
whole model as a stock class of Transformers, reloads it in another process without this package,
and keeps it only if it is the same model (docs/export.md).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lavis.common.cli import gigabytes, output_folder, run_cli, setup_logging
from lavis.common.config import load_config
from lavis.common.errors import ConfigError, WeightsError
from lavis.common.paths import cache_path, require, require_checkpoint, user_path
from lavis.common.schema import Config
from lavis.common.types import DTYPES
from lavis.models.language.qwen1 import read_spec
from lavis.models.legacy import MiniGPT4QwenConfig
from lavis.models.weights.files import load_pickle, state_dict_in
from lavis.models.weights.shards import read_json
from lavis.tools import merge

_QFORMER = ("query_tokens", "ln_vision.", "Qformer.")


def main() -> int:
    """Read a run's configuration and checkpoint, write its model, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg-path", help="a run's YAML; default: config.yaml beside --checkpoint")
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--checkpoint", required=True, help="checkpoint_*.pth of a run")
    parser.add_argument(
        "--format", default="original", choices=("original", "merged", "blip2", "llava"),
        help="original: the trained parts as eva_vit_g.pth, blip2.pth and llm/; merged: the "
        "language model with its adapters in its weights; blip2, llava: the whole model as "
        "Transformers' class (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=output_folder, help="folder to write")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "fp16", "bf16", "fp32"),
        help="of the weights; auto: as the language model has them, with original fp16",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", default=5e9, type=gigabytes, metavar="GB", help="of blip2 and llava"
    )
    parser.add_argument("--device", default="cpu", help="where both models are compared")
    parser.add_argument("--scores", help="scores.json of evaluate.py, for the model card")
    args = parser.parse_args()
    setup_logging()
    checkpoint = require_checkpoint(args.checkpoint, "--checkpoint")
    config = load_config(args.cfg_path or checkpoint.parent / "config.yaml", args.options)
    dtype = DTYPES.get(args.dtype)
    if args.format == "original":
        for path in export(checkpoint, args.out, dtype or torch.float16, config):
            print(path)
        return 0
    if args.format == "merged":
        merge.run(config, args)
        return 0
    merge.require_empty(args.out)
    scores = read_json(user_path(args.scores)) if args.scores else None
    from lavis.models.export.folder import Export

    made, limit, device = Export.of(config, args.format), args.max_shard_size, args.device
    proof = made.write(checkpoint, args.out, dtype=dtype, limit=limit, device=device, scores=scores)
    print(proof)
    print(args.out)
    return 0


def export(
    checkpoint: str | Path, out: Path, dtype: torch.dtype, config: Config | None = None
) -> list[Path]:
    """Write every part that a checkpoint holds.

    Args:
        config: of the run that wrote it; by default what lies beside it.

    Returns:
        The files written.

    Raises:
        WeightsError: the checkpoint is damaged, or holds no part as a whole.
        ConfigError: the run's configuration is missing.
    """
    checkpoint = require_checkpoint(checkpoint, "--checkpoint")
    config = config or load_config(checkpoint.parent / "config.yaml")
    if not isinstance(config.model, MiniGPT4QwenConfig):
        raise ConfigError(
            f"{checkpoint}: only parts of arch minigpt4qwen are written, not of {config.model.arch}"
        )
    trained = state_dict_in(checkpoint, load_pickle(checkpoint))
    llm = _under(trained, "llm_model.")
    if any(".lora_" in name for name in llm):
        raise WeightsError(
            f"{checkpoint} holds adapters, not a language model; python -m lavis.tools.merge "
            "merges them into its weights"
        )
    source = cache_path(config.model.llm_model, config.env.cache_root)
    if llm:  # before anything is written
        require(source / "qwen.tiktoken", "model.llm_model", WeightsError)
        key = partial(config.model.key, "language")
        spec = read_spec(source, config.model.llm_config, need_file=False, key=key)
    state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in trained.items()}
    vit = _under(state, "visual_encoder.")
    qformer = {k: t for k, t in state.items() if k.startswith(_QFORMER)}
    if not (vit or qformer or llm):
        raise WeightsError(f"{checkpoint} holds neither a vision encoder, a Q-Former nor an LLM")
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if vit:
        written.append(out / "eva_vit_g.pth")
        torch.save(vit, written[-1])
    if qformer:
        written.append(out / "blip2.pth")
        torch.save({"model": qformer}, written[-1])
    if llm:
        written += _write_llm(_under(state, "llm_model."), spec.original, source, out / "llm")
    return written


def _write_llm(
    state: dict[str, Tensor], original: dict[str, Any], source: Path, out: Path
) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: t.contiguous() for k, t in state.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(original, indent=1) + "\n", encoding="utf-8")
    vocabulary = out / "qwen.tiktoken"
    if source.resolve() != out.resolve():
        shutil.copyfile(source / "qwen.tiktoken", vocabulary)
    return [out / "model.safetensors", out / "config.json", vocabulary]


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


if __name__ == "__main__":
    run_cli(main)
