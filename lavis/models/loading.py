"""``load_model`` and ``load_model_and_preprocess``, the library's front door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis.common.config import default_model_config
from lavis.common.errors import WeightsError
from lavis.common.packages import check_packages
from lavis.common.paths import REPOSITORY, TOYBOX, require_checkpoint
from lavis.common.registry import MODELS, PROCESSORS
from lavis.common.schema import SplitProcessors

if TYPE_CHECKING:
    import torch

    from lavis.models.vlm import VLM

Processors = dict[str, Callable[..., Any]]


def load_model(
    name: str,
    model_type: str | None = None,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    *,
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
) -> VLM:
    """Build a model from its default configuration, or from a run's.

    Args:
        name: ``minigpt4qwen``, or ``vlm`` with a YAML; ``""`` is whatever the YAML says.
        model_type: ``qwen7b_chat`` (default), ``qwen14b_chat`` or ``toybox``.
        is_eval: evaluation mode.
        device: where the weights go: ``cuda``, ``cuda:N``, ``cpu`` or ``auto``.
        checkpoint: trained projection to load; in evaluation mode the toybox has its own.
        cfg_path: a run's YAML to take the ``model`` section from.
        options: ``model.key=value`` overrides.

    Raises:
        ConfigError, WeightsError: with what to mend.
    """
    return load_model_and_preprocess(
        name, model_type, is_eval, device, checkpoint=checkpoint, cfg_path=cfg_path, options=options
    )[0]


def load_model_and_preprocess(
    name: str,
    model_type: str | None = None,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    llm_device_map: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
) -> tuple[VLM, Processors, Processors]:
    """Build a model and its processors; arguments as :func:`load_model`.

    Args:
        llm_device_map: ``auto`` spreads the language model over the visible GPUs; default: as the
            configuration has it.

    Returns:
        The model, image processors and text processors; the latter two by ``train`` and ``eval``.
    """
    check_packages()
    config = default_model_config(name, model_type, options, cfg_path)
    if llm_device_map is not None:
        options = [f"{config.model.key('language', 'device_map')}={llm_device_map}", *options]
        config = default_model_config(name, model_type, options, cfg_path)
    root = config.env.cache_root
    if cfg_path is None and model_type == "toybox" and root == str(REPOSITORY):
        if not TOYBOX.is_dir():
            raise WeightsError(
                f"no folder {TOYBOX}: the toybox comes with the repository, not with an installed "
                "package. Point env.cache_root at the top of a clone"
            )
        if is_eval and checkpoint is None:
            checkpoint = TOYBOX / "checkpoint.pth"
    config.model.check_files(root)  # before PyTorch is imported
    if checkpoint is not None:
        require_checkpoint(checkpoint)
    from lavis.common.device import pick_device

    target = pick_device(str(device), "device", 'device="cpu"')
    model_class = MODELS.get(config.model.arch)
    model = model_class.from_config(config.model, cache_root=root, device=target)
    vis_processors = _processors(config.preprocess.vis_processor)
    model.vis_processor = vis_processors.get("eval")
    if checkpoint is not None:
        model.load_checkpoint(checkpoint)
    return model.train(not is_eval), vis_processors, _processors(config.preprocess.text_processor)


def _processors(split: SplitProcessors) -> Processors:
    configs = {"train": split.train, "eval": split.eval}
    return {k: PROCESSORS.get(c.name)(c) for k, c in configs.items() if c is not None}
