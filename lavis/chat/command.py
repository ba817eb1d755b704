"""What the programs that chat share: their arguments, and the engine that these ask for."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from lavis.common.cli import TOYBOX, add_model_arguments, resolve_model_arguments
from lavis.common.errors import DataError
from lavis.common.paths import require_checkpoint

if TYPE_CHECKING:
    from lavis.chat.engine import ChatEngine
    from lavis.chat.settings import ChatSettings

logger = logging.getLogger(__name__)

TOYBOX_IMAGE = TOYBOX / "image" / "scene.png"


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model answers, where it computes, and how it chooses."""
    add_model_arguments(parser)
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, cpu or auto (default)")
    parser.add_argument("--cpu-only", action="store_true", help="the same as --device cpu")
    parser.add_argument(
        "--llm_device_map", "--llm-device-map", default="cpu", choices=["cpu", "auto"],
        help="auto spreads the language model over all visible GPUs",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=_whole_number(1), default=512, help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", "-s", type=_whole_number(0), default=1234,
        help="of answers that are drawn (%(default)s)"
    )  # fmt: skip


def _whole_number(least: int) -> Callable[[str], int]:
    """The type of an argument; refuses what is wrong before PyTorch is imported."""

    def parse(text: str) -> int:
        message = f"must be an integer from {least} to 2^63 - 1, not {text!r}"
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(message) from error
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(message)
        return value

    return parse


def load_chat(args: argparse.Namespace) -> tuple[ChatEngine, ChatSettings, bool]:
    """Load what the arguments name.

    Returns:
        The engine, the settings to begin with, and whether the toybox answers because nothing was
        named.

    Raises:
        ConfigError, WeightsError: with what to mend; found before anything large is loaded.
        DataError: the configuration has no image processor for chat.
    """
    toybox = resolve_model_arguments(args)
    require_checkpoint(args.checkpoint)

    from lavis.chat.engine import ChatEngine
    from lavis.chat.settings import ChatSettings
    from lavis.common.device import pick_device
    from lavis.models import load_model_and_preprocess

    logger.info("loading %s with %s", args.cfg_path or args.model_type, args.checkpoint)
    settings = ChatSettings(max_new_tokens=args.max_new_tokens, seed=args.seed)
    model, processors, _ = load_model_and_preprocess(
        "minigpt4qwen",
        args.model_type,
        is_eval=True,
        device=pick_device("cpu" if args.cpu_only else args.device),
        llm_device_map=args.llm_device_map,
        cfg_path=args.cfg_path,
        options=args.options,
    )
    if "eval" not in processors:
        raise DataError("the configuration's preprocess.vis_processor has no `eval`")
    model.load_checkpoint(args.checkpoint)
    return ChatEngine(model, processors["eval"]), settings, toybox
