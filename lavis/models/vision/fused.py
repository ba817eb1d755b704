"""Several vision encoders side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lavis.common.errors import ConfigError, at
from lavis.common.hashing import settings_digest
from lavis.common.registry import VISION_ENCODERS
from lavis.models.contracts import VisionEncoder
from lavis.models.vision.config import KEY, FusedConfig
from lavis.models.vision.tower import Tower
from lavis.models.vision.transforms import Normalization, normalization


class FusedTowers(Tower):
    """Encoders that see the same image, and whose features are concatenated: (N, Q, sum of D)."""

    config: FusedConfig

    def __init__(
        self,
        config: FusedConfig,
        cache_root: str,
        device: torch.device,
        *,
        home: torch.device | None = None,
    ) -> None:
        super().__init__(config, config.transform(cache_root, KEY).image_size)
        self.tokens, self.width = self.shape(config, cache_root)
        self.towers = nn.ModuleList(
            VISION_ENCODERS.get(t.name)(t, cache_root, device, home=home) for t in config.towers
        )
        found = [t.transform(cache_root, key) for t, key in config.each(KEY)]
        self._normalizations: list[Normalization] = [normalization(t) for t in found]

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W), normalized for the first tower -> (N, Q, D)."""
        first, features = self._normalizations[0], []
        for tower, own in zip(self.towers, self._normalizations, strict=True):
            features.append(tower(pixels if own == first else renormalize(pixels, first, own)))
        return torch.cat(features, -1)

    @property
    def keeps_precision(self) -> bool:
        return all(getattr(tower, "keeps_precision", False) for tower in self.towers)

    def blocks(self) -> Iterator[nn.Module]:
        for tower in self._encoders():
            yield from tower.blocks()

    def flops(self, cost: Callable[[nn.Module], float]) -> float:
        return sum(tower.flops(cost) for tower in self._encoders())

    def _encoders(self) -> Iterator[VisionEncoder]:
        yield from self.towers  # type: ignore[misc]

    @staticmethod
    def shape(config: FusedConfig, cache_root: str) -> tuple[int, int]:
        """(Q, D), the shape of an image's features.

        Raises:
            ConfigError: the towers' differ in Q.
        """
        shapes = []
        for tower, key in config.each(KEY):
            with at(key("name").removesuffix(".name")):
                shapes.append(VISION_ENCODERS.get(tower.name).shape(tower, cache_root))
        if len({tokens for tokens, _ in shapes}) > 1:
            numbers = ", ".join(str(tokens) for tokens, _ in shapes)
            raise ConfigError(
                f"model.vision.towers give different numbers of features ({numbers}), which cannot "
                "be put side by side; choose image_size, patch size and class_token to match"
            )
        return shapes[0][0], sum(width for _, width in shapes)

    @staticmethod
    def fingerprint(config: FusedConfig, cache_root: str, device: torch.device) -> str:
        parts: list[object] = []
        for tower, key in config.each(KEY):
            parts.append(VISION_ENCODERS.get(tower.name).fingerprint(tower, cache_root, device))
            parts.append(normalization(tower.transform(cache_root, key)))
        return settings_digest(parts)


def renormalize(pixels: Tensor, given: Normalization, wanted: Normalization) -> Tensor:
    """Pixels with another mean and standard deviation than they were given."""
    (mean, std), (own_mean, own_std) = (
        [pixels.new_tensor(values).view(3, 1, 1) for values in pair] for pair in (given, wanted)
    )
    return (pixels * std + mean - own_mean) / own_std
