"""``load_model`` and ``load_model_and_preprocess``, the library's front door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis.common.config import default_model_config
from lavis.common.packages import check_packages
from lavis.common.paths import require_checkpoint
from lavis.common.registry import MODELS, PROCESSORS
from lavis.common.schema import Config, SplitProcessors

if TYPE_CHECKING:
    import torch

    from lavis.models.minigpt4qwen import MiniGPT4Qwen

Processors = dict[str, Callable[..., Any]]


def load_model(
    name: str,
    model_type: str,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    *,
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
) -> MiniGPT4Qwen:
    """Build a model from its default configuration, or from a run's.

    Args:
        name: ``minigpt4qwen``.
        model_type: ``qwen7b_chat``, ``qwen14b_chat`` or ``toybox``.
        is_eval: evaluation mode.
        device: where the weights go.
        checkpoint: trained projection to load.
        cfg_path: a run's YAML to take the ``model`` section from.
        options: ``model.key=value`` overrides.

    Raises:
        ConfigError, WeightsError: with what to mend.
    """
    config = default_model_config(name, model_type, options, cfg_path)
    return _build(config, is_eval, device, checkpoint)


def load_model_and_preprocess(
    name: str,
    model_type: str,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    llm_device_map: str = "cpu",
    *,
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
) -> tuple[MiniGPT4Qwen, Processors, Processors]:
    """Build a model and its processors; arguments as :func:`load_model`.

    Args:
        llm_device_map: ``auto`` spreads the language model over the visible GPUs.

    Returns:
        The model, image processors and text processors; the latter two by ``train`` and ``eval``.
    """
    options = [f"model.llm_device_map={llm_device_map}", *options]
    config = default_model_config(name, model_type, options, cfg_path)
    model = _build(config, is_eval, device, None)
    preprocess = config.preprocess
    return model, _processors(preprocess.vis_processor), _processors(preprocess.text_processor)


def _build(
    config: Config, is_eval: bool, device: str | torch.device, checkpoint: str | Path | None
) -> MiniGPT4Qwen:
    check_packages()
    config.model.check_files(config.env.cache_root)  # before PyTorch is imported
    if checkpoint is not None:
        require_checkpoint(checkpoint)
    model_class = MODELS.get(config.model.arch)
    model = model_class.from_config(config.model, cache_root=config.env.cache_root, device=device)
    if checkpoint is not None:
        model.load_checkpoint(checkpoint)
    return model.train(not is_eval)


def _processors(split: SplitProcessors) -> Processors:
    configs = {"train": split.train, "eval": split.eval}
    return {k: PROCESSORS.get(c.name)(c) for k, c in configs.items() if c is not None}
