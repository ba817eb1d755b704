"""A vision encoder of timm, from a weight file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lavis.common.errors import ConfigError
from lavis.common.hashing import file_digest, settings_digest
from lavis.common.paths import cache_path
from lavis.models.vision.config import KEY, TimmConfig
from lavis.models.vision.eva import fill_constants
from lavis.models.vision.tower import Tower, compute_dtype, pick_tokens
from lavis.models.weights.files import load_weights, open_shard
from lavis.models.weights.original import SAME_NAMES

_HEAD = re.compile(r"(head|fc_norm|norm|norm_pre|attn_pool)\.")
_BLOCK = re.compile(r"(?:blocks|stages|layers)\.(\d+)\.")


def outline(config: TimmConfig, cache_root: str) -> tuple[Any, int]:
    """A model of timm on the meta device, up to the layer that gives the features.

    Returns:
        The model, and the pixels of a side that it reads.

    Raises:
        ConfigError: timm has no such model, or it has no such layer.
    """
    size = config.transform(cache_root, KEY).image_size
    with torch.device("meta"):
        model: Any = timm.create_model(config.model, pretrained=False)
    if not hasattr(model, "prune_intermediate_layers") or _blocks(model) is None:
        raise ConfigError(
            f"model.vision.model: {config.model} gives no features of its blocks; take another"
        )
    depth = len(model.feature_info)
    kept = config.blocks_of(depth)
    model.prune_intermediate_layers([kept - 1], prune_norm=kept < depth, prune_head=True)
    if config.keeps_class and getattr(model, "cls_token", None) is None:
        raise ConfigError(f"model.vision.class_token: keep: {config.model} has none")
    return model, size


class TimmVision(Tower):
    """A model of timm, whose features are those of its patches, or of its grid, row by row."""

    config: TimmConfig

    def __init__(
        self,
        config: TimmConfig,
        cache_root: str,
        device: torch.device,
        *,
        home: torch.device | None = None,
    ) -> None:
        """Build it and load its weights, each tensor straight to its final place.

        Raises:
            WeightsError: the file is missing, damaged, or unfit.
        """
        model, size = outline(config, cache_root)
        super().__init__(config, size)
        self.tokens, self.width = self.shape(config, cache_root)
        dtype, place = compute_dtype(config.precision, device), home or device
        if device.type != "meta":
            load_weights(
                model,
                open_shard(cache_path(config.path, cache_root)),
                SAME_NAMES,
                device=place,
                dtype=dtype,
                extra_dropped=partial(_is_past, len(_blocks(model))),
            )
            fill_constants(model, place)
        self.visual_encoder = model.to(dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        weight = next(self.visual_encoder.parameters())
        return _features(self.config, self.visual_encoder, pixels.to(weight.dtype))

    def blocks(self) -> Iterable[nn.Module]:
        return list(_blocks(self.visual_encoder))

    def flops(self, cost: Callable[[nn.Module], float]) -> float:
        # As if all of it ran on the features' grid.
        return self.tokens * cost(self.visual_encoder)

    @staticmethod
    def shape(config: TimmConfig, cache_root: str) -> tuple[int, int]:
        model, size = outline(config, cache_root)
        features = _features(config, model.eval(), torch.empty(1, 3, size, size, device="meta"))
        return features.shape[1], features.shape[2]

    @staticmethod
    def fingerprint(config: TimmConfig, cache_root: str, device: torch.device) -> str:
        model, size = outline(config, cache_root)
        parts = [
            file_digest(cache_path(config.path, cache_root)), config.model, size,
            len(_blocks(model)), config.class_token,
            str(compute_dtype(config.precision, device)),
        ]  # fmt: skip
        return settings_digest(parts)


def _features(config: TimmConfig, model: Any, pixels: Tensor) -> Tensor:
    features: Tensor = model.forward_features(pixels)
    if features.ndim == 4:
        last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
    leading = getattr(model, "num_prefix_tokens", 0)
    return pick_tokens(features, leading, keep=config.keeps_class)


def _blocks(model: nn.Module) -> Any:
    """Its transformer blocks or stages, in order, if it has any."""
    named = (getattr(model, name, None) for name in ("blocks", "stages", "layers"))
    return next((part for part in named if part is not None), None)


def _is_past(kept: int, name: str) -> bool:
    """Whether a name in the file is of what comes after the features."""
    block = _BLOCK.match(name)
    return bool(_HEAD.match(name)) or (block is not None and int(block[1]) >= kept)
