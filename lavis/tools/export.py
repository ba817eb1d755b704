"""Write the parts that a checkpoint trained in the original's file layouts."""

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

from lavis.common.cli import output_folder, run_cli, setup_logging
from lavis.common.config import load_config
from lavis.common.errors import ConfigError, WeightsError
from lavis.common.paths import cache_path, require, require_checkpoint
from lavis.common.types import DTYPES
from lavis.models.language.qwen1 import read_spec
from lavis.models.legacy import MiniGPT4QwenConfig
from lavis.models.weights.files import load_pickle, state_dict_in

_QFORMER = ("query_tokens", "ln_vision.", "Qformer.")


def main() -> int:
    """Read a run's configuration and checkpoint, write its trained parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint_*.pth of a run")
    parser.add_argument(
        "--out", required=True, type=output_folder,
        help="folder to write: eva_vit_g.pth, blip2.pth, llm/, each if it was trained",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="fp16", choices=("fp16", "bf16", "fp32"), help="default: %(default)s"
    )
    args = parser.parse_args()
    setup_logging()
    for path in export(args.checkpoint, args.out, DTYPES[args.dtype]):
        print(path)
    return 0


def export(checkpoint: str | Path, out: Path, dtype: torch.dtype) -> list[Path]:
    """Write every part that a checkpoint holds.

    Returns:
        The files written.

    Raises:
        WeightsError: the checkpoint is damaged, or holds no part as a whole.
        ConfigError: the run's configuration is missing.
    """
    checkpoint = require_checkpoint(checkpoint, "--checkpoint")
    config = load_config(checkpoint.parent / "config.yaml")
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
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if vit := _under(state, "visual_encoder."):
        written.append(out / "eva_vit_g.pth")
        torch.save(vit, written[-1])
    if qformer := {k: t for k, t in state.items() if k.startswith(_QFORMER)}:
        written.append(out / "blip2.pth")
        torch.save({"model": qformer}, written[-1])
    if llm:
        written += _write_llm(_under(state, "llm_model."), spec.original, source, out / "llm")
    if not written:
        raise WeightsError(f"{checkpoint} holds neither a vision encoder, a Q-Former nor an LLM")
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
