"""``load_model`` and ``load_model_and_preprocess``, the library's front door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis.common.config import default_model_config
from lavis.common.errors import WeightsError
from lavis.common.packages import check_packages
from lavis.common.paths import REPOSITORY, TOYBOX, require_checkpoint
from lavis.common.registry import MODELS, PROCESSORS
from lavis.common.schema import Config

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
    found = find_model(
        name,
        model_type,
        checkpoint=checkpoint,
        cfg_path=cfg_path,
        options=options,
        llm_device_map=llm_device_map,
        is_eval=is_eval,
    )
    return found.load(device, "device", 'device="cpu"')


@dataclass(frozen=True)
class FoundModel:
    """A model whose files are there; nothing large has been read.

    Attributes:
        config: its configuration, with the processors.
        checkpoint: what was trained, if there is any.
        is_eval: whether it is loaded in evaluation mode.
    """

    config: Config
    checkpoint: Path | None
    is_eval: bool

    def require_room(self, new_tokens: int, key: str) -> None:
        """Refuse a setting ``key`` by which an answer leaves no room for a question.

        Raises:
            WeightsError, ConfigError: also, what the small files beside the weights say.
        """
        model = self.config.model
        if describe := getattr(MODELS.get(model.arch), "describe", None):
            _, language, _ = describe(model, self.config.env.cache_root)
            language.require_room(new_tokens, key)

    def load(
        self, device: str | torch.device, key: str, without: str
    ) -> tuple[VLM, Processors, Processors]:
        """Load it, as :func:`load_model_and_preprocess` returns it.

        Args:
            key: what the user calls the device, for messages.
            without: what to give in its place on a machine without a GPU.
        """
        from lavis.common.device import pick_device
        from lavis.models.weights.files import open_pth

        config = self.config
        target = pick_device(str(device), key, without)
        if self.checkpoint is not None:
            open_pth(self.checkpoint)  # its table of contents, before the weights of the parts
        options: dict[str, Any] = {"cache_root": config.env.cache_root, "device": target}
        if getattr(config.model, "load_finetuned", False):
            options["start"] = self.checkpoint is not None or not self.is_eval
        model = MODELS.get(config.model.arch).from_config(config.model, **options)
        vis_processors = _processors(config, "vis_processor")
        model.vis_processor = vis_processors.get("eval")
        if self.checkpoint is not None:
            model.load_checkpoint(self.checkpoint)
        text_processors = _processors(config, "text_processor")
        return model.train(not self.is_eval), vis_processors, text_processors


def find_model(
    name: str,
    model_type: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
    llm_device_map: str | None = None,
    is_eval: bool = True,
) -> FoundModel:
    """Find what a model is built from; arguments as :func:`load_model_and_preprocess`.

    Does not import PyTorch.

    Raises:
        ConfigError, WeightsError: with what to mend.
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
    found = None if checkpoint is None else require_checkpoint(checkpoint)
    config.model.check_files(root)
    return FoundModel(config, found, is_eval)


def _processors(config: Config, kind: str) -> Processors:
    made: Processors = {}
    for side in ("train", "eval"):
        chosen = getattr(getattr(config.preprocess, kind), side)
        if kind == "vis_processor":
            chosen = config.fit(f"preprocess.{kind}.{side}", chosen)
        if chosen is not None:
            made[side] = PROCESSORS.get(chosen.name)(chosen)
    return made
