"""What vision encoders of libraries share: `hf`, `timm` and `fused`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lavis.common.errors import DataError
from lavis.common.types import DTYPES
from lavis.models.vision.config import VisionConfig

logger = logging.getLogger(__name__)
_PLACE = re.compile(
    r"visual_encoder\.(?:(?P<after>post_layernorm|layernorm|norm|rms_norm)\."
    r"|(?:.*?(?:blocks|stages|layers?)\.(?P<block>\d+)\.)?)"
)


class Tower(nn.Module):
    """A vision encoder whose features are what a library's model gives for each patch.

    Attributes:
        visual_encoder: the library's model.
        image_size: pixels of a side that it reads.
        width: D, of a feature.
        tokens: Q, features of an image.
    """

    visual_encoder: nn.Module
    width: int
    tokens: int

    def __init__(self, config: VisionConfig, image_size: int) -> None:
        super().__init__()
        self.config, self.image_size = config, image_size

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, Q, D)."""
        raise NotImplementedError

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, Q, D) features.

        Raises:
            DataError: images of another shape.
        """
        require_images(pixel_values, self.image_size)
        weight = next(self.parameters())
        grad = torch.is_grad_enabled() and learns(self)
        amp = torch.is_autocast_enabled(weight.device.type) and self.config.enable_autocast
        amp = amp and not self.keeps_precision
        with torch.set_grad_enabled(grad), torch.autocast(weight.device.type, enabled=amp):
            return self.encode(pixel_values.to(weight.device))

    @property
    def keeps_precision(self) -> bool:
        """Whether autocast leaves it alone: it is frozen, and in half precision already."""
        return not learns(self) and next(self.parameters()).dtype != torch.float32

    def learning(self, parts: Sequence[str]) -> Iterator[nn.Module | nn.Parameter]:
        """What learns: all of it."""
        yield self


def learns(module: nn.Module) -> bool:
    """Whether anything in it does."""
    return any(p.requires_grad for p in module.parameters())


def require_images(pixels: Tensor, size: int) -> None:
    """Refuse images of another shape.

    Raises:
        DataError: saying which.
    """
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise DataError(
            f"images have the shape {tuple(pixels.shape)}, not (N, 3, {size}, {size}) as "
            "the vision encoder's image_size says; check vis_processor.image_size"
        )


def compute_dtype(precision: str, device: torch.device, key: str = "precision") -> torch.dtype:
    """What a vision encoder computes in on a device."""
    if precision == "fp16" and device.type == "cpu":
        logger.info("%s: fp16 is computed in fp32 on a CPU, as in the original", key)
        return torch.float32
    return DTYPES[precision]


def pick_tokens(tokens: Tensor, leading: int, *, keep: bool) -> Tensor:
    """Patches of (N, leading + Q, D) tokens, behind the class token, the first, if it is kept."""
    patches = tokens[:, leading:]
    return torch.cat([tokens[:, :1], patches], 1) if keep else patches


def layers_above(names: Iterable[str]) -> Callable[[str], int]:
    """Says how many layers there are from a parameter to the end of its ViT.

    Of block i of ``depth`` it is ``depth - i``, of what comes before the blocks one more than there
    are, and 0 of what comes after them or is no ViT's.
    """
    found = {name: place for name in names if (place := _PLACE.search(name))}
    depths: dict[str, int] = {}
    for name, place in found.items():
        if block := place["block"]:
            vit = name[: place.start()]
            depths[vit] = max(depths.get(vit, 0), int(block) + 1)

    def above(name: str) -> int:
        if (place := found.get(name)) is None or place["after"]:
            return 0
        depth = depths.get(name[: place.start()], 0)
        return depth - int(place["block"]) if place["block"] else depth + 1

    return above
