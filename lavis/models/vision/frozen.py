"""A run's vision encoder by itself, for features that are computed once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lavis.common.errors import ConfigError
from lavis.common.hashing import settings_digest
from lavis.common.paths import require_writable
from lavis.common.registry import MODELS
from lavis.common.schema import Config
from lavis.common.types import DTYPES
from lavis.models.config import PartsConfig
from lavis.models.weights.files import open_pth

logger = logging.getLogger(__name__)
_NAMES = ("visual_encoder.", "ln_vision.", "Qformer.", "query_tokens", "vision.")  # in a checkpoint
_KEY = "run.feature_cache"


@dataclass(frozen=True)
class FrozenVision:
    """What the vision encoder of a run computes, under autocast as in training."""

    config: Config

    def check(self) -> None:
        """Check that features can be kept, before anything is read.

        Raises:
            ConfigError: training changes them, no file determines them, or their folder cannot be
                written.
        """
        model = self._model
        if model.trained_vision:
            raise ConfigError(
                f"{_KEY}: the vision side is trained ({', '.join(model.trained_vision)}), so its "
                f"features change at every step; freeze it, or set {_KEY}.enabled: false"
            )
        if scratch := model.parts[0].random_parts:
            raise ConfigError(
                f"{_KEY}: {' and '.join(scratch)} would start from random weights "
                f"({model.key('vision', 'from_scratch')}), which nothing can find again; name "
                f"weight files, or set {_KEY}.enabled: false"
            )
        root = self.config.env.cache_root
        checkpoint = model.finetuned_path(root)
        names = open_pth(checkpoint) if checkpoint is not None else ()
        if found := next((name for name in names if name.startswith(_NAMES)), None):
            raise ConfigError(
                f"{_KEY}: model.finetuned ({checkpoint}) holds {found}, and the cache reads the "
                "vision side from its own weight files alone; write its parts with python -m "
                f"lavis.tools.export (arch minigpt4qwen), or set {_KEY}.enabled: false"
            )
        require_writable(self.config.run.feature_cache.folder(root), f"{_KEY}.dir", ConfigError)

    def describe(self, device: torch.device) -> tuple[str, tuple[int, int]]:
        """What :meth:`load` would give, without loading anything.

        Returns:
            A fingerprint of weights, settings and precision, and the shape (Q, D) of features.
        """
        run, model = self.config.run, self._model
        encoder, shape = MODELS.get(model.arch).describe_vision(
            model, cache_root=self.config.env.cache_root, device=device
        )
        eyes = model.parts[0]
        amp = [str(DTYPES[run.autocast_dtype]), eyes.enable_autocast]
        reached = run.amp and not eyes.keeps_precision(device)
        return settings_digest([encoder, amp if reached else None]), shape

    def load(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The encoder: (N, 3, H, W) pixels -> (N, Q, D) fp32, on the CPU."""
        logger.info("loading the vision side to encode images; training goes on without it")
        run, model = self.config.run, self._model
        vision = MODELS.get(model.arch).build_vision(
            model, cache_root=self.config.env.cache_root, device=device
        )

        def encode(pixels: Tensor) -> Tensor:
            dtype = DTYPES[run.autocast_dtype]
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=run.amp):
                features: Tensor = vision(pixels.to(device))
            return features.float().cpu()

        return encode

    @property
    def _model(self) -> PartsConfig:
        model = self.config.model
        if not isinstance(model, PartsConfig):
            raise ConfigError(f"{_KEY}: model arch {model.arch!r} has no vision side to keep")
        return model
