"""What the programs that chat share: their arguments, and the engine that these ask for."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from typing import TYPE_CHECKING

from lavis.common.cli import gigabytes, whole_number
from lavis.common.config import add_config_arguments, default_model_config
from lavis.common.errors import ConfigError, DataError
from lavis.common.paths import REPOSITORY, TOYBOX
from lavis.models.config import PartsConfig
from lavis.models.loading import find_model

if TYPE_CHECKING:
    import torch

    from lavis.chat.engine import ChatEngine
    from lavis.chat.settings import ChatSettings
    from lavis.common.schema import Config

logger = logging.getLogger(__name__)
_CACHE_SHARE = 0.75

TOYBOX_IMAGE = TOYBOX / "image" / "scene.png"


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model answers, where it computes, and how it chooses.

    Without a model, the toybox answers.
    """
    add_config_arguments(parser, required=False)
    parser.add_argument("--model-type", help="qwen7b_chat (default), qwen14b_chat or toybox")
    parser.add_argument(
        "--checkpoint", "--checkpoint-path", "-c", metavar="PTH",
        help="trained projection; without it and --cfg-path, the toybox of this repository answers",
    )  # fmt: skip
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--device", default="auto", help="cuda, cuda:N, cpu or auto (default)")
    device.add_argument(
        "--cpu-only", action="store_const", const="cpu", dest="device", help="as --device cpu"
    )
    device.add_argument(
        "--gpu_id", "--gpu-id", type=_gpu, dest="device", metavar="N", help="as --device cuda:N"
    )
    parser.add_argument(
        "--llm_device_map", "--llm-device-map", choices=["cpu", "auto"],
        help="auto spreads the language model over all visible GPUs",
    )  # fmt: skip
    parser.add_argument(
        "--cache-gb", type=gigabytes, dest="cache_bytes", metavar="GB",
        help="memory for the keys and values of all conversations; those idle longest are computed "
        "anew beyond (on a GPU: three quarters of what the weights leave; on a CPU: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU, record a conversation's pass of a token and replay it: less time between "
        "tokens of small or packed models, a moment more before an answer; not measured yet",
    )
    parser.add_argument(
        "--max-new-tokens", type=whole_number(1), default=512, help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", "-s", type=whole_number(0), default=1234,
        help="of answers that are drawn (%(default)s)"
    )  # fmt: skip


def _gpu(text: str) -> str:
    return f"cuda:{whole_number(0)(text)}"


def choose_model(args: argparse.Namespace) -> bool:
    """Fill in what :func:`add_chat_arguments` left open.

    Returns:
        Whether the toybox was chosen because nothing else was named.

    Raises:
        ConfigError: a configuration or a model type without a checkpoint.
    """
    if args.checkpoint is None and (args.cfg_path or args.model_type):
        named = "--cfg-path" if args.cfg_path else "--model-type"
        raise ConfigError(f"{named} needs --checkpoint: the projection that was trained for it")
    toybox = args.checkpoint is None
    if toybox:
        args.model_type = "toybox"
        args.checkpoint = str(TOYBOX / "checkpoint.pth")
        print(
            f"Answering with the toybox ({TOYBOX.relative_to(REPOSITORY)}), a tiny model of "
            "coloured shapes; --checkpoint PTH [--cfg-path YAML] loads real weights.",
            file=sys.stderr,
        )
    if args.cfg_path is None:
        args.model_type = args.model_type or "qwen7b_chat"
    return toybox


def config_of(args: argparse.Namespace) -> Config:
    """The configuration that the arguments name; no file of the model's is looked for.

    Raises:
        ConfigError: with what to mend.
    """
    kind = args.model_type or ("qwen7b_chat" if args.cfg_path or args.checkpoint else "toybox")
    name = "" if args.cfg_path else "minigpt4qwen"  # a YAML says which
    return default_model_config(name, None if args.cfg_path else kind, args.options, args.cfg_path)


def load_chat(args: argparse.Namespace) -> tuple[ChatEngine, ChatSettings, bool]:
    """Load what the arguments name.

    Returns:
        The engine, the settings to begin with, and whether the toybox answers because nothing was
        named.

    Raises:
        ConfigError, WeightsError: with what to mend; found before anything large is loaded.
        DataError: the configuration has no image processor for chat.
    """
    toybox = choose_model(args)
    found = find_model(
        "" if args.cfg_path else "minigpt4qwen",  # a YAML says which
        args.model_type,
        checkpoint=args.checkpoint,
        cfg_path=args.cfg_path,
        options=args.options,
        llm_device_map=args.llm_device_map,
    )
    processor = found.config.preprocess.vis_processor.eval
    if found.config.fit("preprocess.vis_processor.eval", processor) is None:
        raise DataError("the configuration's preprocess.vis_processor has no `eval`")
    found.require_room(args.max_new_tokens, "--max-new-tokens")

    from lavis.common.device import pick_device

    model = found.config.model
    spread = isinstance(model, PartsConfig) and model.parts[2].device_map == "auto"
    if args.cuda_graphs and (
        spread or pick_device(args.device, "--device", "--device cpu").type != "cuda"
    ):
        raise ConfigError("--cuda-graphs needs a model on one GPU: give --device cuda, or leave it")

    from lavis.chat.engine import ChatEngine
    from lavis.chat.graph import record_cuda
    from lavis.chat.settings import ChatSettings

    logger.info("loading %s with %s", args.cfg_path or args.model_type, args.checkpoint)
    settings = ChatSettings(max_new_tokens=args.max_new_tokens, seed=args.seed)
    loaded, processors, _ = found.load(args.device, "--device", "--device cpu")
    engine = ChatEngine(
        loaded,
        processors["eval"],
        video=found.config.preprocess.video,
        tiles=found.config.preprocess.tiles,
        cache_bytes=args.cache_bytes or room_for_cache({p.device for p in loaded.parameters()}),
        record=record_cuda if args.cuda_graphs else None,
    )
    return engine, settings, toybox


def room_for_cache(devices: set[torch.device]) -> float:
    """Bytes of keys and values that conversations may hold, once the weights are loaded.

    On GPUs three quarters of what is free: a pass needs room, too. On a CPU there is no limit.
    """
    from lavis.models.compute.memory import free_memory

    cards = [device for device in devices if device.type == "cuda"]
    return sum(map(free_memory, cards)) * _CACHE_SHARE if cards else math.inf
