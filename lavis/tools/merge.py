"""Merge a run's adapters (LoRA, DoRA) into the language model's weights.

``python -m lavis.tools.merge --cfg-path run.yaml --checkpoint checkpoint.pth --out folder`` writes
a folder like the one that the run was trained on, and beside the weights ``connector.pth``, all
else that the checkpoint trained, and ``run.yaml``, with which chat, evaluation and training go on.
The merged model is read back and has to answer as the adapters did.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from lavis.common.cli import output_folder, run_cli, setup_logging
from lavis.common.config import add_config_arguments, load_config
from lavis.common.errors import ConfigError
from lavis.common.packages import check_packages
from lavis.common.schema import Config
from lavis.models.config import PartsConfig


def main() -> int:
    """Check what was asked for, merge, compare, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--checkpoint", required=True, help="checkpoint_*.pth of the run")
    parser.add_argument(
        "--out", required=True, type=output_folder, help="folder to write: a new or an empty one"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "fp16", "bf16", "fp32"),
        help="of the merged weights; auto, the default: as stored before",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where both models are compared")
    args = parser.parse_args()
    setup_logging()
    run(load_config(args.cfg_path, args.options), args)
    return 0


def run(config: Config, args: argparse.Namespace) -> None:
    """Merge as a command's ``checkpoint``, ``out``, ``dtype`` and ``device`` say."""
    check_mergeable(config, args.out)

    from lavis.common.device import pick_device
    from lavis.common.types import DTYPES
    from lavis.models.language.merged import merge

    device = pick_device(args.device, "--device", "--device cpu")
    print(merge(config, args.checkpoint, args.out, dtype=DTYPES.get(args.dtype), device=device))
    print(args.out)


def check_mergeable(config: Config, out: Path) -> None:
    """Refuse, before anything is read, what cannot be merged.

    Raises:
        ConfigError: there are no adapters, their base has no weights to add to, or ``out`` holds
            something.
    """
    model = config.model
    if not isinstance(model, PartsConfig) or model.lora is None:
        raise ConfigError(
            f"{config.source}: no adapters are trained with it (model.train.language.lora, in the "
            "original's keys model.get_lora); there is nothing to merge"
        )
    llm, key = model.parts[2], partial(model.key, "language")
    if llm.quantize or llm.path.endswith(".gguf"):
        what = "quantize" if llm.quantize else "path"
        what = f"{key(what)}: {getattr(llm, what)}"
        raise ConfigError(
            f"{what}: adapters cannot be merged into quantized weights without changing what they "
            "add; name the folder in full precision that the weights were made of, which the "
            "merged model then differs from as much as quantization does"
        )
    if getattr(llm, "from_scratch", False):
        raise ConfigError(f"{key('from_scratch')}: random weights stand in no folder to merge into")
    check_packages("lora", "merging adapters")
    require_empty(out)


def require_empty(out: Path) -> None:
    """Refuse a folder to write that holds something.

    Raises:
        ConfigError: it does.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out: {out} is not empty, and nothing is overwritten; name a new one")


if __name__ == "__main__":
    run_cli(main)
