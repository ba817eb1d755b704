"""Where a model is assembled: vision encoder, connector, language model, what is trained."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from lavis.common.device import warn_of_emulation
from lavis.common.errors import ConfigError
from lavis.common.paths import cache_path
from lavis.common.registry import CONNECTORS, LANGUAGE_MODELS, VISION_ENCODERS
from lavis.models.compute.cpu import widen_frozen_linears
from lavis.models.compute.schedule import StepSchedule
from lavis.models.config import PartsConfig, VlmConfig
from lavis.models.contracts import VisionEncoder
from lavis.models.language.adapters import add_lora, lora_targets
from lavis.models.language.causal import CausalLM
from lavis.models.language.parts import LanguagePart
from lavis.models.legacy import MiniGPT4QwenConfig
from lavis.models.vlm import VLM
from lavis.models.weights.files import own_trainable
from lavis.models.weights.original import full_model
from lavis.models.weights.projector import load_projector
from lavis.processors.conversation import ConversationEncoder

logger = logging.getLogger(__name__)


class Assembly:
    """Builds models of parts. Every ``arch`` is one of these."""

    Config: ClassVar[type[PartsConfig]] = VlmConfig

    @classmethod
    def from_config(
        cls,
        config: PartsConfig,
        *,
        cache_root: str = "cache",
        device: str | torch.device = "cpu",
        vision: bool = True,
        mapped: bool = False,
        start: bool = False,
    ) -> VLM:
        """Build a model and load its weights, each tensor straight to its final place.

        Random parts draw from PyTorch's global generator. Without ``vision`` the model has no
        vision encoder, and reads features in place of images. ``mapped`` is for a strategy that
        shards: the weights stay in main memory, those of files as views of them, and each process
        copies its slices to ``device``; see :func:`lavis.models.weights.files.final_dtype`.
        ``start``: ``model.finetuned`` may lack what is new, since it is going to be trained, or
        another checkpoint to be loaded.

        Raises:
            WeightsError: a file is missing (found before anything is read), damaged, or unfit.
            ConfigError: sizes do not fit each other.
        """
        device = torch.device(device)
        home = torch.device("cpu") if mapped else device
        config.check_files(cache_root)
        parts = cls.describe(config, cache_root)
        spread = config.parts[2].device_map == "auto"
        language = parts[1].load(torch.device("cpu") if spread else home, mapped=mapped)
        seeing = None
        if vision:
            seeing = cls.build_vision(config, cache_root=cache_root, device=device, home=home)
        model = cls._join(config, parts, seeing, language, home, cache_root)
        if not mapped:
            own_trainable(model)
        if path := config.finetuned_path(cache_root):
            model.load_checkpoint(path, start=start)
        if spread:
            _dispatch(language)
        weight = language.head.weight
        warn_of_emulation(weight.device, weight.dtype, config.key("language", "precision"))
        if home == device:
            widen_frozen_linears(model)  # where the weights stay: not on a card
        return model.train(False)

    @classmethod
    def outline(cls, config: PartsConfig, *, cache_root: str, vision: bool = True) -> VLM:
        """The model on the meta device, of what the small files say; no weight is looked for.

        Raises:
            WeightsError, ConfigError: as :meth:`describe`.
        """
        parts, meta = cls.describe(config, cache_root), torch.device("meta")
        seeing = None
        if vision:
            seeing = cls.build_vision(config, cache_root=cache_root, device=meta)
        language = parts[1].sized_outline()
        return cls._join(config, parts, seeing, language, meta, cache_root)

    @classmethod
    def _join(
        cls,
        config: PartsConfig,
        described: tuple[ConversationEncoder, LanguagePart, tuple[int, int]],
        seeing: VisionEncoder | None,
        language: CausalLM,
        home: torch.device,
        cache_root: str,
    ) -> VLM:
        """A connector between them, and what learns."""
        (encoder, part, features), (_, connector, llm) = described, config.parts
        with home:
            joint = CONNECTORS.get(connector.name)(connector, features[1], language.width)
        if home.type == "meta":
            pass  # nothing has numbers
        elif connector.path is not None:
            load_projector(joint, cache_path(connector.path, cache_root), config.key)
        elif connector.init == "embeddings":
            _scale_to_embeddings(joint, language)
        model = VLM(
            config,
            seeing,
            joint,
            language,
            encoder,
            key_map=full_model(part.keys),
            features=features,
            image_size=config.transform(cache_root).image_size,
        )
        model.set_trainable()
        if config.lora is not None:
            add_lora(language, config.lora)
            language.to(home)
        model.set_schedule(StepSchedule(recompute="all" if llm.grad_ckpt else "none"))
        return model

    @classmethod
    def describe(
        cls, config: PartsConfig, cache_root: str
    ) -> tuple[ConversationEncoder, LanguagePart, tuple[int, int]]:
        """What the small files beside the weights say: also (Q, D) of an image's features.

        Raises:
            WeightsError, ConfigError: as :meth:`from_config`; no weight has been read.
        """
        eyes, connector, llm = config.parts
        described: LanguagePart = LANGUAGE_MODELS.get(llm.name)(
            llm, cache_root, partial(config.key, "language")
        )
        if config.max_txt_len > described.context:
            raise ConfigError(
                f"model.max_txt_len {config.max_txt_len} is past this language model's context of "
                f"{described.context}{described.past_context}"
            )
        if config.lora is not None:
            lora_targets(described.outline(), config.lora)
        features = VISION_ENCODERS.get(eyes.name).shape(eyes, cache_root)
        encoder = ConversationEncoder(
            described.tokenizer,
            described.template,
            CONNECTORS.get(connector.name).tokens(connector, features[0]),
            config.max_txt_len,
            config.label_mask,
            described.system,
        )
        return encoder, described, features

    @classmethod
    def build_encoder(cls, config: PartsConfig, cache_root: str) -> ConversationEncoder:
        """What turns conversations into this model's ids and labels; reads no weight."""
        return cls.describe(config, cache_root)[0]

    @classmethod
    def build_vision(
        cls,
        config: PartsConfig,
        *,
        cache_root: str,
        device: torch.device,
        home: torch.device | None = None,
    ) -> VisionEncoder:
        """The vision encoder alone, frozen, in evaluation mode; ``home`` as in its contract.

        Raises:
            WeightsError: a file is missing, damaged, or unfit.
        """
        eyes = config.parts[0]
        kind = VISION_ENCODERS.get(eyes.name)
        vision: VisionEncoder = kind(eyes, cache_root, device, home=home)
        vision.requires_grad_(False).eval()
        return vision

    @classmethod
    def describe_vision(
        cls,
        config: PartsConfig,
        *,
        cache_root: str,
        device: torch.device,
    ) -> tuple[str, tuple[int, int]]:
        """What the vision encoder computes, without loading anything.

        Returns:
            A fingerprint of weights and settings, and the shape (Q, D) of an image's features.

        Raises:
            WeightsError: a weight file is missing.
        """
        eyes = config.parts[0]
        for _ in eyes.files(cache_root, partial(config.key, "vision")):
            pass  # which checks them
        kind = VISION_ENCODERS.get(eyes.name)
        return kind.fingerprint(eyes, cache_root, device), kind.shape(eyes, cache_root)


class MiniGPT4Qwen(Assembly):
    """The original's model, by the original's keys."""

    Config: ClassVar[type[PartsConfig]] = MiniGPT4QwenConfig


def _scale_to_embeddings(connector: nn.Module, language: CausalLM) -> None:
    """Draw a connector's last layer anew, so that its output is as large as the embeddings.

    Far larger soft tokens would drown what the language model's layers add to them.
    """
    last = [m for m in connector.modules() if isinstance(m, nn.Linear)][-1]
    embeddings: Any = language.model.get_input_embeddings()
    std = float(embeddings.weight[:1000].detach().float().std())
    with torch.no_grad():
        nn.init.normal_(last.weight, std=std / last.in_features**0.5)
        if last.bias is not None:
            last.bias.zero_()


def _dispatch(language: CausalLM) -> None:
    """Spread a language model's layers over the visible GPUs."""
    llm: Any = language.model
    if torch.cuda.device_count() < 2:
        if torch.cuda.is_available():
            llm.to("cuda")
        return
    import accelerate
    from accelerate.utils import get_balanced_memory

    whole = [type(next(language.blocks())).__name__]
    # By default the first card would be filled first, with no room left for keys and values.
    shares = get_balanced_memory(llm, no_split_module_classes=whole)
    device_map = accelerate.infer_auto_device_map(llm, shares, no_split_module_classes=whole)
    if "cpu" in device_map.values():
        logger.warning("the GPUs' memory is short: a part of the language model stays on the CPU")
    accelerate.dispatch_model(llm, device_map)
