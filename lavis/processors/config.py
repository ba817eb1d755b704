"""Options of the built-in processors, as they stand in YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lavis.common.errors import ConfigError
from lavis.common.schema import ProcessorConfig
from lavis.common.typed import only, ranged

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageEvalConfig(ProcessorConfig):
    """``blip_image_eval``: resize to a square, normalization.

    What is not given is the vision encoder's, and where that says nothing, bicubic and CLIP's.
    """

    image_size: int | None = ranged(None, least=1)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise ConfigError(f"{name} must have 3 values, not {len(value)}")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"std must be positive, not {list(self.std)}")


@dataclass(frozen=True)
class ImageTrainConfig(ImageEvalConfig):
    """``blip2_image_train``: random resized crop, horizontal flip, normalization."""

    min_scale: float = 0.5
    max_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_scale <= self.max_scale:
            raise ConfigError(
                f"need 0 < min_scale <= max_scale, not {self.min_scale} and {self.max_scale}"
            )


@dataclass(frozen=True)
class BaseInstructionConfig(ProcessorConfig):
    """``base_instruction``: text unchanged. ``max_words`` is the original's and had no effect."""

    max_words: int = 100
    prompt: str = only("", "base_instruction leaves text unchanged; write it into the annotations")


@dataclass(frozen=True)
class BaseTextConfig(ProcessorConfig):
    """``base_text``: lower case, at most ``max_words`` words."""

    max_words: int = 50
    prompt: str = only("", "base_text puts nothing in front; use blip_caption")


@dataclass(frozen=True)
class BlipCaptionConfig(ProcessorConfig):
    """``blip_caption``: lower case, no punctuation, at most ``max_words`` words."""

    prompt: str = ""
    max_words: int = 50
